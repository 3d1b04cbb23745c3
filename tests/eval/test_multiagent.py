"""The board of teams, on the embedded model: the workload, the rows, and requests that cannot be."""

from __future__ import annotations

import json

import pytest

from agentkv.eval import multiagent
from agentkv.eval.textbench import load_text_model

SMALL = ["--model", "mini", "--shared", "60", "--agents", "2", "--documents", "1", "--requests", "2", "--fresh", "60"]


def test_a_workload_is_the_same_every_time_and_holds_its_answers() -> None:
    _, tokenizer = load_text_model("mini")
    work = multiagent.Workload(200, 2, 9)
    made = work.make(tokenizer)
    assert made == work.make(tokenizer) and len(made) == 9
    assert len({(asked.document, asked.question) for asked in made}) == 9 and len({x.document for x in made}) == 2
    for asked in made:
        assert asked.answer in asked.document and asked.answer not in asked.question
        assert 100 < len(tokenizer(asked.document)["input_ids"]) <= 200
    with pytest.raises(ValueError, match="13 requests about 2 documents"):
        multiagent.Workload(200, 2, 13)


@pytest.mark.parametrize("tokens", [16, 32, 64])
def test_a_short_document_holds_the_facts_that_fit(tokens) -> None:
    _, tokenizer = load_text_model("mini")
    for asked in multiagent.Workload(tokens, 3, 3).make(tokenizer):
        assert asked.answer in asked.document
        assert len(asked.document.splitlines()) == tokens // 16
    with pytest.raises(ValueError, match=f"documents of {tokens} tokens: .* allow {tokens // 16} requests"):
        multiagent.Workload(tokens, 1, tokens // 16 + 1)
    with pytest.raises(ValueError, match="documents of 15 tokens"):
        multiagent.Workload(15, 1, 1)


def test_rows_of_all_methods(tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "rows.json"
    assert multiagent.main([*SMALL, "--json", str(path)]) == 0
    told = json.loads(path.read_text())
    assert told["meta"]["command"].startswith("python -m eval.multiagent --model mini")
    rows = {row["method"]: row for row in told["rows"]}
    assert tuple(rows) == multiagent.METHODS
    for row in rows.values():
        assert {"agents", "reuse", "unchanged", "ttft_ratio", "low", "high"} <= set(row)
        assert row["n"] == 2 and row["calls"] == 4 and row["agents"] == 2
    assert rows["dense"]["reuse"] == 0 and rows["dense"]["unchanged"] == rows["dense"]["ttft_ratio"] == 1
    assert rows["recompute"]["reuse"] == 1 and rows["prefix"]["computed_tokens"] < rows["dense"]["computed_tokens"]
    # The second question about the only document: its text is known to both agents, and the rest is read anew.
    assert rows["kvcomm-fresh"]["reuse"] == 0.5 and rows["kvcomm-fresh"]["unchanged"] == 1
    assert rows["kvcomm-fresh"]["kv_bytes"] > 0
    # Again: everything is there, and nobody is asked.
    monkeypatch.setattr(multiagent, "Side", None)
    assert multiagent.main([*SMALL, "--json", str(path)]) == 0
    assert json.loads(path.read_text())["rows"] == told["rows"]
    assert multiagent.main([*SMALL, "--gamma", "1", "--json", str(path)]) == 2
    assert "holds another board" in capsys.readouterr().err


def test_the_crossover_lies_between_the_lengths_measured() -> None:
    rows = [
        {"method": "kvcomm", "gamma": 0.3, "shared": n, "reuse": 0.5, "ttft_ratio_reused": x}
        for n, x in ((256, 2.0), (64, 0.5))
    ]
    assert multiagent.crossover(rows, "kvcomm", 0.3) == pytest.approx(128)
    assert multiagent.crossover(rows, "kvcomm", 1.0) is None
    assert multiagent.crossover(rows[:1], "kvcomm", 0.3) is None and multiagent.crossover(rows, "prefix") is None


def test_thresholds_are_compared_in_one_run(tmp_path) -> None:
    path = tmp_path / "rows.json"
    assert multiagent.main([*SMALL, "--methods", "recompute,kvcomm-fresh", "--gamma", "0,1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    sides = [("dense", None), ("recompute", None), ("kvcomm-fresh", 0.0), ("kvcomm-fresh", 1.0)]
    assert [(row["method"], row["gamma"]) for row in rows] == sides


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--agents", "9"], "agents=9: a team has 2 to 5"),
        (["--methods", "kvcom"], "did you mean kvcomm"),
        (["--requests", "50"], "50 requests about"),
        (["--gamma", "-1"], "gamma=-1"),
        (["--fresh", "0"], "--fresh: 0 is not a number of tokens"),
        (["--model", "no-such-model"], "no-such-model"),
    ],
)
def test_requests_that_cannot_be_are_refused_before_anything_runs(argv, said, capsys) -> None:
    assert multiagent.main([*SMALL, *argv]) == 2
    assert said in capsys.readouterr().err
