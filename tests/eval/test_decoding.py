"""The decoding evaluation on untrained models: arms, turns, ratios, resume; GSM8K's file, prompts and score."""

from __future__ import annotations

import json
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import pytest

from agentkv.eval import decoding, gsm8k
from dlm import mini, sources
from dlm.cache import list_caches
from dlm.config import DecodingConfig
from dlm.decode import decode
from dlm.mini import load_mini
from dlm.mini.problems import make_problem
from dlm.prompts import pad_left
from dlm.unmask import list_rules
from tests.dlm import untrained
from training.dlm.tokenizer import build_tokenizer

SMALL = ["--gen-length", "6", "--block-length", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained.make(tmp_path_factory.mktemp("weights"))


@pytest.fixture(autouse=True)
def embedded(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The untrained models stand for the embedded ones."""
    for module in (mini, sources):
        monkeypatch.setattr(module, "WEIGHTS", weights)


@pytest.mark.parametrize(
    ("entry", "cache", "rule"),
    [
        ("none", "none", None),
        ("freecache(delay=0)+threshold(0.9)", "freecache(delay=0)", "threshold(0.9)"),
        ("freecache+kivi(4)+guided", "freecache+kivi(4)", "guided"),
        ("freecache+snapkv(0.3)", "freecache+snapkv(0.3)", None),
        ("dual+guided('topk', k=2)", "dual", "guided('topk', k=2)"),
    ],
)
def test_entries_of_the_grid(entry: str, cache: str, rule: str | None) -> None:
    assert decoding.split_entry(entry) == (cache, rule)


def test_arms() -> None:
    plain = DecodingConfig(gen_length=8, block_length=4)
    arms = decoding.arms_of(["freecache+guided", "none", "dual+factor(1.0)"], plain, guided=True)
    assert [arm.name for arm in arms] == [
        "none", "freecache+guided", "dual+factor(1.0)", "none, fewer steps (4)", "none, fewer steps (2)",
    ]  # fmt: skip
    assert [arm.config.guided for arm in arms] == [False, True, False, False, False]
    assert {arm.config.eos for arm in arms} == {"stop"} and [arm.config.steps for arm in arms] == [8, 8, 8, 4, 2]
    # No step fewer than there are blocks, and no arm twice.
    short = decoding.arms_of(["none"], DecodingConfig(gen_length=4, block_length=2), guided=False)
    assert [arm.config.steps for arm in short] == [4, 2]
    every = {arm.name for arm in decoding.arms_of(["all"], plain, guided=True)}
    # What ssd cannot verify, and what edit does not see, is not in the grid.
    refused = {"dkv+ssd", "dllm-cache+ssd", "dkv+edit", "elastic+ssd", "elastic+edit"} | {
        f"{cache}+wino" for cache in ("dkv", "dllm-cache", "elastic")
    }
    assert {f"{cache}+{rule}" for cache in list_caches(False) for rule in list_rules()} - refused < every
    assert not refused & every
    assert {"dual+suffix+guided", "dual+suffix+ssd", "elastic+klass", "dual+wino"} < every
    assert not any("guided" in arm.name for arm in decoding.arms_of(["all"], plain, guided=False))


def test_hard_problems_have_a_model_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "d.json"
    assert decoding.main(["--task", "hard", "--n", "1", "--grid", "dual+guided", *SMALL, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {(row["task"], row["model"]) for row in rows} == {("hard", "mini-hard")}
    assert [row["guide"] for row in rows] == ["none", "mini", "none", "none"]
    assert "hard, 1 problems" in capsys.readouterr().out


def test_rows(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "d.json"
    argv = ["--n", "3", "--batch-size", "2", "--grid", "freecache,freecache+kivi(4)+guided", "--eos", "none", *SMALL]
    assert decoding.main([*argv, "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "freecache+kivi(4)+guided" in said and "none, fewer steps (3)" in said and "arithmetic, 3 problems" in said
    rows = json.loads(path.read_text())["rows"]
    base, cached, guided, fewer, fewest = rows
    assert [row["unmask"] for row in rows] == ["confidence", "confidence", "guided", "confidence", "confidence"]
    assert [row["guide"] for row in rows] == ["none", "none", "mini", "none", "none"]
    assert guided["cache"] == "freecache+kivi(4)" and guided["guider_forwards"] >= 2
    assert base["forwards"] == cached["forwards"] == 12 and base["tokens_per_forward"] == 1.0
    assert fewer["forwards"] == 6 and fewer["forwards_ratio"] == 2.0 and fewer["tokens_per_forward"] == 2.0
    assert fewest["steps"] == 2 and fewest["forwards_ratio"] == 3.0
    # One token per step and no end of text: the closed forms.
    lengths = [len(build_tokenizer()(make_problem(1_000_000 + i).prompt)["input_ids"]) for i in range(3)]
    assert base["query_tokens"] == sum(6 * (p + 6) for p in lengths)
    assert cached["query_tokens"] == sum(p + 6 * (6 + 3) // 2 + 3 for p in lengths)
    assert cached["query_tokens_ratio"] == base["query_tokens"] / cached["query_tokens"]
    assert base["cache_bytes_peak"] == 0 < cached["cache_bytes"] <= cached["cache_bytes_peak"]
    for row in rows:
        assert row["n"] == 3 and len(row["right"]) == 3 and row["seconds"] > 0 and row["tokens"] <= 18
        assert row["accuracy"] == row["right"].count("1") / 3 and row["low"] <= row["accuracy"] <= row["high"]
        assert row["seconds_ratio"] == base["seconds"] / row["seconds"] and row["accuracy_change"] == 0


def test_answers_are_those_of_decode_and_are_scored(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(decoding, "final_answer", lambda text: seen.append(text) or make_problem(1_000_001).total)
    assert decoding.main(["--n", "2", "--grid", "none", "--steps", "2", *SMALL]) == 0
    model, tokenizer = load_mini(weights / "llada")
    for i in range(2):
        ids, mask = pad_left([tokenizer(make_problem(1_000_000 + i).prompt)["input_ids"]], 0)
        ids = decode(model, ids, mask, gen_length=6, block_length=3, steps=2, cache="none").ids[0]
        assert seen[i] == tokenizer.decode(ids, skip_special_tokens=True)


def test_accuracy_counts_right_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An arm that is right on the second of two problems only."""
    monkeypatch.setattr(decoding, "final_answer", lambda text: make_problem(1_000_001).total)
    assert decoding.main(["--n", "2", "--grid", "none", "--json", str(tmp_path / "d.json"), *SMALL]) == 0
    rows = json.loads((tmp_path / "d.json").read_text())["rows"]
    assert [row["right"] for row in rows] == ["01"] * len(rows) and rows[0]["accuracy"] == 0.5


def test_arms_take_turns_and_a_stopped_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, int]] = []
    plain = decoding.Bench.answer

    def answer(bench: decoding.Bench, arm: decoding.Arm, first: int, tally: decoding.Tally) -> list[list[int]]:
        if len(order) == 5 and stop:
            raise KeyboardInterrupt
        order.append((arm.name, first))
        return plain(bench, arm, first, tally)

    monkeypatch.setattr(decoding.Bench, "answer", answer)
    path, stop = tmp_path / "d.json", [True]
    argv = ["--n", "3", "--grid", "none,dual", *SMALL, "--json", str(path)]
    assert decoding.main(argv) == 130
    assert "with --json goes on" in capsys.readouterr().err
    names = ["none", "dual", "none, fewer steps (3)", "none, fewer steps (2)"]
    assert order == [(name, 0) for name in names] + [("dual", 1)]
    stop.clear()
    order.clear()
    assert decoding.main(argv) == 0
    turned = [names[(i + turn) % 4] for turn in (1, 2) for i in range(4)]
    assert order == list(zip(turned, [1] * 4 + [2] * 4, strict=True))
    whole = json.loads(path.read_text())["rows"]
    # Answers are compared with the first arm's, problem by problem, also by a run that goes on.
    assert (whole[0]["same"], whole[0]["equal"]) == ("111", 1.0)
    assert all(row["equal"] == row["same"].count("1") / 3 for row in whole)
    order.clear()
    assert decoding.main(argv) == 0
    assert not order and json.loads(path.read_text())["rows"] == whole
    (tmp_path / "once.json").unlink(missing_ok=True)
    assert decoding.main([*argv[:-1], str(tmp_path / "once.json")]) == 0
    for row, once in zip(whole, json.loads((tmp_path / "once.json").read_text())["rows"], strict=True):
        assert {k: v for k, v in row.items() if "seconds" not in k} == {
            k: v for k, v in once.items() if "seconds" not in k
        }
    assert decoding.main([*argv, "--seed", "3"]) == 2
    assert "d.json holds another measurement" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--grid", "guided"], "names no cache; write none+guided, or freecache+guided"),
        (["--grid", "none+guided", "--guide", "none"], "needs a guide; name one with --guide"),
        (["--grid", "freecash"], "did you mean freecache"),
        (["--grid", "dual+snapkv(0.3)"], "only freecache and block freeze slots for good"),
        (["--grid", ""], "names nothing; give one or more"),
        (["--n", "0"], "0 is not a number of questions; use 1"),
        (["--gen-length", "0"], "gen_length=0 is no number of tokens"),
        (["--steps", "1"], "steps=1 do not reach"),
        (["--task", "gsm8k"], "needs --data FILE"),
        (["--task", "gsm8k", "--data", "nowhere.jsonl"], "there is no file or folder 'nowhere.jsonl'"),
        (["--shots", __file__], "--shots is for --task gsm8k"),
        (["--model", "./nowhere"], "is no folder here"),
        (["--gen-length", "4000"], "positions, the model has 2048; shorten the prompt"),
    ],
)
def test_refused_before_a_model_is_loaded(
    more: Sequence[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "open_model", lambda *args: pytest.fail("a model was loaded"))
    assert decoding.main([*SMALL, *more]) == 2
    assert message in capsys.readouterr().err


QUESTION = {"question": "How many? ", "answer": "It is 2*3=<<2*3=6>>6 dollars.\nSo $<<1200=1200>>1,200.\n#### 1,200"}


def gsm8k_file(folder: Path, rows: int = 2) -> Path:
    (folder / "test.jsonl").write_text("\n".join([json.dumps(QUESTION)] * rows) + "\n")
    return folder / "test.jsonl"


def test_gsm8k_questions_and_prompts(tmp_path: Path) -> None:
    path = gsm8k_file(tmp_path)
    asked = gsm8k.read_questions(path)
    assert asked == gsm8k.read_questions(tmp_path) and len(asked) == 2
    assert asked[0] == gsm8k.Question("How many?", "It is 2*3=6 dollars.\nSo $1,200.\n#### 1,200", Decimal(1200))
    assert gsm8k.prompt(asked[0]) == "Question: How many?\nAnswer:"
    assert gsm8k.prompt(asked[0], asked[1:]).startswith("Question: How many?\nAnswer: It is 2*3=6 dollars.")
    assert gsm8k.prompt(asked[0], asked[1:]).endswith("#### 1,200\n\nQuestion: How many?\nAnswer:")
    assert gsm8k.prompt(asked[0], chat=True).endswith("only #### and the number.")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", 7),
        ("#### $1,234.50 in all", "1234.5"),
        ("#### -12.", -12),
        ("The answer is 18.", 18),
        ("first 5, then 1,000, he said", 1000),
        ("#### 3\n#### 4", 4),
        ("#### 3\n\nQuestion: and 9?\nAnswer: #### 9", 3),
        ("#### 42 of 50", 42),
        ("#### none", None),
        ("no number", None),
        ("", None),
    ],
)
def test_gsm8k_numbers(text: str, number: object) -> None:
    assert gsm8k.number_in(text) == (None if number is None else Decimal(number))


def test_gsm8k_files_that_are_none(tmp_path: Path) -> None:
    for line, message in (
        ("nonsense", "x.jsonl:1 is no problem"),
        ('{"question": "a"}', "x.jsonl:1 is no problem"),
        ('{"question": "a", "answer": "5"}', 'x.jsonl:1: the answer does not end in "#### number"'),
        ("", "x.jsonl has no problems"),
    ):
        (tmp_path / "x.jsonl").write_text(line + "\n")
        with pytest.raises(ValueError, match=message):
            gsm8k.read_questions(tmp_path / "x.jsonl")


def test_gsm8k_from_command_to_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = gsm8k_file(tmp_path)
    argv = ["--task", "gsm8k", "--data", str(path), "--grid", "none", "--json", str(tmp_path / "d.json"), *SMALL]
    assert decoding.main([*argv, "--n", "3"]) == 2
    assert "has 2 problems and --n is 3; use at most --n 2" in capsys.readouterr().err
    monkeypatch.setattr(decoding, "answer_text", lambda *args: "so #### $1,200")
    assert decoding.main([*argv, "--n", "2", "--shots", str(path)]) == 0
    assert {row["accuracy"] for row in json.loads((tmp_path / "d.json").read_text())["rows"]} == {1.0}
