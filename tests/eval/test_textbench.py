"""The text evaluation on an untrained model of the embedded shape: what is counted, resumed and refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from agentkv.eval import leaderboard, needle, perplexity
from agentkv.eval.quantized import HAS_FP8
from agentkv.eval.textbench import continuation, examples, load_text_model, recall, text_rows
from textkv.mini.filler import sentences
from training.export import export
from training.text.shape import fresh_model
from training.text.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder as the training writes it, with random weights."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(" " + " ".join(words) for words in sentences(300, seed=0))
    model = fresh_model(tokenizer)
    place = tmp_path_factory.mktemp("text")
    export(model, dict(model.named_parameters()), tokenizer, place, {})
    return str(place)


def test_a_full_budget_continues_as_the_full_cache(folder: str) -> None:
    model, tokenizer = load_text_model(folder)
    rows = text_rows(tokenizer, None, 2, 160)
    truth, same = (continuation(model, m, "1.0", rows, 128) for m in ("full", "snapkv"))
    assert truth.nll.shape == (2, 32) and len(truth.outputs) == 4
    torch.testing.assert_close(same.nll, truth.nll)
    assert same.error(truth) < 1e-5
    less = continuation(model, "snapkv", "0.2", rows, 128)
    assert less.error(truth) > 1e-3
    assert less.held["tokens_stored"] == 25 and less.held["kv_bytes"] < 0.25 * less.held["kv_bytes_full"]


def test_an_answer_counts_when_every_token_is_right(folder: str) -> None:
    model, tokenizer = load_text_model(folder)
    asked = examples(tokenizer, "needle", 128, 3)
    right, figures = recall(model, "full", "1.0", asked)
    assert len(right) == 3 and figures["kv_bytes"] >= figures["kv_bytes_full"]
    prompt = torch.from_numpy(asked[0].prompt_ids)[None]
    said = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, do_sample=False)
    object.__setattr__(asked[0], "answer_ids", said[0, -2:].numpy())
    assert recall(model, "full", "1.0", asked[:1])[0] == [True]


def test_board_from_command_to_plot_and_resume(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board, page, plot = tmp_path / "b.json", tmp_path / "b.md", tmp_path / "b.png"
    argv = ["--model", folder, "--length", "128", "--n", "2", "--tasks", "needle", "--workers", "1"]
    argv += ["--json", str(board), "--markdown", str(page), "--plot", str(plot), "--budgets", "0.5,0.2"]
    assert leaderboard.main([*argv, "--methods", "snapkv"]) == 0
    said = capsys.readouterr().out
    assert "snapkv" in said and "full" in said
    first = json.loads(board.read_text())["rows"]
    assert [(r["method"], r["budget"]) for r in first[::3]] == [("full", "1.0"), ("snapkv", "0.5"), ("snapkv", "0.2")]
    assert all(math.isfinite(r["perplexity"]) for r in first if r["task"] == "text")
    assert page.read_text().count("\n") == 7 and plot.stat().st_size > 1000
    assert leaderboard.main([*argv, "--methods", "snapkv,window"]) == 0
    again = json.loads(board.read_text())["rows"]
    assert again[: len(first)] == first and {r["method"] for r in again[len(first) :]} == {"window"}
    assert leaderboard.main([*argv, "--methods", "snapkv", "--n", "3"]) == 2
    assert "holds another board" in capsys.readouterr().err


@pytest.mark.skipif(not HAS_FP8, reason="this transformers has no fp8 cache")
def test_transformers_cache_is_a_row_and_decoding_has_one(folder: str) -> None:
    board = leaderboard.Board(folder, ("needle",), 96, 1, None, "cpu", memory=128)
    worker = leaderboard.Worker(board)
    rows = [row for method in ("full", "hf-fp8") for row in worker.measure(method, "1.0")]
    at = {(row["method"], row["task"]): row for row in rows}
    assert at["hf-fp8", "recall"]["kv_bits"] == pytest.approx(8, abs=0.1)
    assert at["full", "text"]["logit_error"] == 0 < at["hf-fp8", "text"]["logit_error"] < 1
    assert at["hf-fp8", "decoding"]["step_largest_share"] >= 0.5, "all keys of a layer, dequantised"
    page = leaderboard.markdown(rows, board.tasks).splitlines()
    assert page[0].endswith("| largest | alive |") and len({line.count("|") for line in page}) == 1


def test_needle_and_perplexity_from_command_to_plot(folder: str, tmp_path: Path) -> None:
    out, plot = tmp_path / "n.json", tmp_path / "n.png"
    argv = ["--model", folder, "--lengths", "96,128", "--depths", "2", "--n", "1", "--methods", "full,snapkv"]
    assert needle.main([*argv, "--json", str(out), "--plot", str(plot)]) == 0
    assert len(json.loads(out.read_text())["rows"]) == 2 * 2 * 2 and plot.exists()
    out, plot = tmp_path / "p.json", tmp_path / "p.png"
    argv = ["--model", folder, "--cache", "16", "--tokens", "60", "--stretches", "2", "--methods", "full,window"]
    assert perplexity.main([*argv, "--json", str(out), "--plot", str(plot)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [r["to"] for r in rows] == [30, 59] * 2 and plot.exists()
    assert rows[0]["perplexity"] != rows[2]["perplexity"], "a window of 16 tokens changes the first stretch"


def test_perplexity_goes_on_with_the_methods_that_are_missing(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, read, stream = tmp_path / "p.json", [], perplexity.stream
    monkeypatch.setattr(
        perplexity, "stream", lambda model, method, *rest: read.append(method) or stream(model, method, *rest)
    )
    argv = ["--model", folder, "--tokens", "60", "--stretches", "2", "--json", str(out)]
    assert perplexity.main([*argv, "--cache", "16", "--methods", "window"]) == 0
    before = json.loads(out.read_text())["rows"]
    assert perplexity.main([*argv, "--cache", "16", "--methods", "window,streaming_llm"]) == 0
    assert read == ["window", "streaming_llm"] and json.loads(out.read_text())["rows"][:2] == before
    assert perplexity.main([*argv, "--cache", "20", "--methods", "window"]) == 2
    assert "another board" in capsys.readouterr().err and len(json.loads(out.read_text())["rows"]) == 4


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        (leaderboard, ["--methods", "snapkw"], "did you mean snapkv"),
        (leaderboard, ["--budgets", "40"], "use 0.4 for 40 %"),
        (leaderboard, ["--model", "nowhere"], "no such folder"),
        (leaderboard, ["--model", "biased:evn"], "use biased:even or biased:slow"),
        (leaderboard, ["--memory", "64"], "memory=64: give the tokens of a prompt, at least 128"),
        (leaderboard, ["--methods", "hf-quanta(4)"], "did you mean hf-quanto"),
        (needle, ["--task", "needel"], "did you mean needle"),
        (needle, ["--depths", "1"], "depths=1: use at least 2"),
        (perplexity, ["--cache", "9000"], "longer than the cache"),
    ],
)
def test_bad_requests_are_refused(command, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(argv) == 2
    assert message in capsys.readouterr().err
