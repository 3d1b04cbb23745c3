"""The board of real models, on an untrained tiny one: prompts, scores, resuming, and one reading for all methods."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from agentkv.eval import board, ruler
from agentkv.eval.outcomes import Outcome, Outcomes
from agentkv.eval.textbench import load_text_model
from textkv import MethodCache
from textkv.mini.filler import sentences
from textkv.mini.words import KEYS
from training.export import export
from training.text.shape import fresh_model
from training.text.tokenizer import build_tokenizer

LENGTH = 384


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder with random weights whose tokenizer knows the words of the prompts."""
    torch.manual_seed(0)
    words = [" " + " ".join(line) for line in sentences(300, seed=0)] + [f" {key} 0123456789\n" for key in KEYS] * 3
    tokenizer = build_tokenizer(words)
    model = fresh_model(tokenizer)
    place = tmp_path_factory.mktemp("text")
    export(model, dict(model.named_parameters()), tokenizer, place, {})
    return str(place)


@pytest.fixture(scope="module")
def maker(folder: str) -> ruler.Maker:
    return ruler.Maker(load_text_model(folder)[1], LENGTH)


# ---- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ruler.TASKS)
def test_a_prompt_has_its_length_and_holds_its_answer(maker: ruler.Maker, task: str) -> None:
    length = LENGTH if task != "multikey" else 2 * LENGTH
    maker = maker if length == LENGTH else ruler.Maker(maker.tokenizer, length)
    for number in range(4):
        made, again = maker.make(task, number), maker.make(task, number)
        assert len(made.text) + len(made.question) == length and np.array_equal(made.text, again.text)
        text, question = (maker.tokenizer.decode(ids.tolist()) for ids in (made.text, made.question))
        assert made.answer in text and made.answer not in question and made.answer.isdigit()
        assert len(made.answer) == 4 and 0 <= made.depth <= 1
    assert made.answer != maker.make(task, 0).answer


def test_the_answer_follows_from_the_text_alone() -> None:
    rng = np.random.default_rng(0)
    asked = ruler._variables(["a", "b", "c", "d", "e", "f"], rng)
    values = dict(line.removeprefix("The value of ").rstrip(".").split(" is ") for line in asked.lines)
    at = "f"
    while not values[at].isdigit():
        at = values[at].removeprefix("the value of ")
    assert values[at] == asked.answer and at == "e" and len(values) == 6
    assert asked.lines[-1] == f"The value of e is {asked.answer}."
    pairs = ruler._pairs(["a", "b"], rng)
    assert pairs.lines[-1] == f"b: {pairs.answer}" and pairs.begun == "b:"
    named = ruler._named(["a", "b"], rng)
    assert named.lines[-1] == f"The secret number of the b is {named.answer}." and "the b" in named.question


def test_a_chat_template_frames_the_prompt(maker: ruler.Maker) -> None:
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}<model>"
    tokenizer = maker.tokenizer
    try:
        tokenizer.chat_template = template
        made = ruler.Maker(tokenizer, LENGTH).make("needle", 0)
        text, question = (tokenizer.decode(ids.tolist()) for ids in (made.text, made.question))
        assert text.lstrip().startswith("<user>") and "<end><model>" in question.replace(" ", "")
        assert len(made.text) + len(made.question) == LENGTH
        tokenizer.chat_template = "{{ messages[0]['content'] | length }}"
        with pytest.raises(ValueError, match="chat template changes"):
            ruler.Maker(tokenizer, LENGTH)
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("said", "whole", "share"),
    [
        (" 4821.", True, 1), ("4821", True, 1), (" 4,821", True, 1), (" 48217", False, 1),
        (" 4822 no, 4821", False, 0.75), (" 482", False, 0.75), (" a number", False, 0),
        ("", False, 0), (" 1482", False, 0.0),
    ],
)  # fmt: skip
def test_digits_are_compared_place_by_place(said: str, whole: bool, share: float) -> None:
    assert ruler.score(said, "4821") == (whole, share)


# ---- one reading for all, and what is written down ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "snapkv", "h2o", "kivi(4)", "streaming_llm", "cake", "expected+adakv"])
def test_answers_are_those_of_the_methods_own_run(folder: str, method: str) -> None:
    made = board.Board(folder, ("needle",), ("known", "unknown"), LENGTH)
    bench = board.Bench(made, [(method, "0.3"), ("critic", "0.3")], 2, "cpu")
    (batch,) = board.batches(bench.maker, "needle", 2, "cpu")
    model = bench.model
    both = torch.cat([batch.text, batch.question], 1)
    reading = board.Reading(model, both, list(bench.cells.values()))
    said = board.answer(model, *bench._read(reading, both, bench.cells[method, "0.3"]), None)
    cache = MethodCache(model, method, "0.3")
    mask = torch.ones_like(both)
    length = {"max_new_tokens": board.SPOKEN, "min_new_tokens": board.SPOKEN, "do_sample": False}
    own = model.generate(both, attention_mask=mask, past_key_values=cache, **length)
    assert torch.equal(said, own[:, both.shape[1] :]), "question known"
    reading = board.Reading(model, batch.text, list(bench.cells.values()))
    later, logits = bench._read(reading, batch.text, bench.cells[method, "0.3"])
    said = board.answer(model, later, logits, batch.question)
    cache = MethodCache(model, method, "0.3")
    with torch.inference_mode():
        model(batch.text, past_key_values=cache)
        cache.freeze()
        logits = model(batch.question, past_key_values=cache).logits[:, -1]
        own = []
        for _ in range(board.SPOKEN):
            own.append(logits.argmax(-1, keepdim=True))
            logits = model(own[-1], past_key_values=cache).logits[:, -1]
    assert torch.equal(said, torch.cat(own, 1)), "question unknown"
    assert later.at_rest.kv_bytes == cache.at_rest.kv_bytes
    if method == "snapkv":
        new = batch.question.shape[1] + board.SPOKEN - 1
        assert later.tokens_seen == batch.text.shape[1] + new
        kept = later.at_rest.tokens_stored
        assert kept < batch.text.shape[1] / 3, "the question came to a small cache"
        assert later.layers[0].lengths().unique().tolist() == [kept + new], "and nothing left it for the question"


def test_a_method_that_reads_otherwise_reads_itself(folder: str) -> None:
    made = board.Board(folder, ("needle",), ("known",), LENGTH)
    cell = ("streaming_llm(prefill='exact_stream')", "64t")
    bench = board.Bench(made, [cell], 1, "cpu")
    (batch,) = board.batches(bench.maker, "needle", 1, "cpu")
    (outcome,) = bench._answers(batch, "known", [cell])
    assert not outcome.refused and outcome.figures["tokens_stored"] == 64


def run(folder: str, path: Path, methods: str = "snapkv", *more: str) -> int:
    argv = ["--model", folder, "--length", str(LENGTH), "--n", "2", "--tasks", "needle,pairs", "--budgets", "0.3"]
    return board.main([*argv, "--json", str(path), "--methods", methods, *more])


def test_from_command_to_rows_and_on_again(folder: str, tmp_path: Path, monkeypatch, capsys) -> None:
    path, lines = tmp_path / "b.json", tmp_path / "b.jsonl"
    page = tmp_path / "b.md"
    assert run(folder, path, "snapkv", "--markdown", str(page)) == 0
    assert "question unknown to the cache" in capsys.readouterr().out
    told = page.read_text()
    assert (
        told.count("| `snapkv` | 0.3 |") == 2
        and "n prompts of 384 tokens" in told
        and "| digits | n |" in told
        and "eval.board" in told
    )
    made = json.loads(path.read_text())
    rows = made["rows"]
    assert made["meta"]["seed"] == ruler.SEED and made["meta"]["board"]["length"] == LENGTH
    assert [(r["method"], r["asked"], r["task"]) for r in rows[:4]] == [
        ("full", "known", "needle"), ("full", "known", "pairs"), ("full", "known", "all"),
        ("full", "unknown", "needle"),
    ]  # fmt: skip
    at = {(r["method"], r["asked"], r["task"]): r for r in rows}
    known = at["snapkv", "known", "all"]
    assert known["n"] == 4 and known["low"] <= known["recall"] <= known["high"] and 0 <= known["digits"] <= 1
    assert known["tokens_seen"] == LENGTH > at["snapkv", "unknown", "all"]["tokens_seen"]
    assert 0.29 < known["kv_share"] < 0.33 and known["tokens_stored"] == pytest.approx(0.3 * LENGTH, abs=1)

    # Killed in the middle of a line: what is whole stays, the rest is measured again, and the rows are the same.
    whole = lines.read_text().splitlines(keepends=True)
    assert len(whole) == 1 + 2 * 2 * 2
    lines.write_text("".join(whole[:4]) + whole[4][:20])
    read = []
    monkeypatch.setattr(board, "Reading", lambda *a: read.append(a[1].shape) or Reading(*a))
    assert run(folder, path) == 0
    assert lines.read_text().splitlines()[:4] == [line.rstrip("\n") for line in whole[:4]]
    again = {(r["method"], r["asked"], r["task"]): r for r in json.loads(path.read_text())["rows"]}
    assert all(again[key]["recall"] == at[key]["recall"] for key in at) and len(read) == 3
    read.clear()
    assert run(folder, path) == 0 and not read, "everything is there"
    assert run(folder, path, "snapkv,window") == 0 and len(read) == 4, "a further method needs readings of its own"
    assert len(json.loads(path.read_text())["rows"]) == 3 * 2 * 3
    read.clear()
    assert run(folder, path, "snapkv", "--n", "3") == 0 and len(read) == 4, "more questions, on top of the old ones"
    assert {row["n"] for row in json.loads(path.read_text())["rows"]} == {3, 6}
    read.clear()
    assert run(folder, path, "snapkv", "--n", "1") == 0 and not read
    assert {row["n"] for row in json.loads(path.read_text())["rows"]} == {1, 2}, "fewer: a part of what is there"
    capsys.readouterr()
    assert run(folder, path, "snapkv", "--length", "400") == 2
    assert "holds another board" in capsys.readouterr().err


Reading = board.Reading


def test_a_method_that_cannot_is_a_row_of_its_own(folder: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "b.json"
    assert run(folder, path, "kivi(4,channels=24)") == 0
    assert "refused: kivi(4,channels=24) at 1.0, question known: " in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    refused = [row for row in rows if row["task"] == "refused"]
    assert {row["asked"] for row in refused} == {"known", "unknown"} and "channels" in refused[0]["reason"]
    assert [row for row in rows if row["method"] == "full"], "and the others go on"


def test_outcomes_of_something_else_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("a note\n")
    with pytest.raises(ValueError, match="no file of outcomes"):
        Outcomes(path, {})
    assert path.read_text() == "a note\n"
    path.write_text('{"board": ')
    fresh = Outcomes(path, {"n": 1})
    fresh.add(Outcome("full", "1.0", "needle", "known", 0, [True], [1.0], {"kv_bytes": 2, "kv_bytes_full": 2}))
    assert Outcomes(path, {"n": 1}).done == fresh.done


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--methods", "snapkw"], "did you mean snapkv"),
        (["--budgets", "40"], "use 0.4 for 40 %"),
        (["--tasks", "needel"], "did you mean needle"),
        (["--asked", "maybe"], "known: known, unknown"),
        (["--methods", "hf-fp8"], "python -m eval.leaderboard"),
        (["--n", "0"], "0 is not a number of questions; use 1"),
        (["--model", "nowhere"], "no such folder"),
        (["--text", "nowhere.txt"], "there is no file"),
        (["--length", "100"], "use at least 256"),
        (["--length", "100000"], "the model knows"),
    ],
)
def test_bad_requests_are_refused(argv: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert board.main([*argv, "--json", str(tmp_path / "b.json")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
