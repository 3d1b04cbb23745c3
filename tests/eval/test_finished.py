"""Rows of an earlier start: what is whole stays, what is another's is refused."""

from __future__ import annotations

import json

import pytest

from agentkv.eval import retrieval
from agentkv.eval.finished import finished

BOARD = {"model": "mini", "layers": [0]}


def test_only_whole_rows_of_the_same_board_are_gone_on_from(tmp_path) -> None:
    path = tmp_path / "rows.json"
    assert finished(path, BOARD, bool) == finished(None, BOARD, bool) == []
    path.write_text(json.dumps({"meta": {"board": BOARD}, "rows": [{"n": 4}, {"n": 1}]}))
    assert finished(path, BOARD, lambda row: row["n"] == 4) == [{"n": 4}]
    with pytest.raises(ValueError, match="holds another board"):
        finished(path, BOARD | {"layers": [1]}, bool)
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds no rows"):
        finished(path, BOARD, bool)


def test_a_length_that_was_measured_is_not_measured_again(tmp_path, monkeypatch) -> None:
    pytest.importorskip("faiss", reason="faiss is not installed")
    path, measured = tmp_path / "rows.json", []
    measure = retrieval.rows_of
    monkeypatch.setattr(retrieval, "rows_of", lambda heads, degree: measured.append(1) or measure(heads, degree))
    for drawn in ("300", "400", "300"):
        argv = ["--tokens", "0", "--drawn", drawn, "--asked", "2", "--degree", "4", "--json", str(path)]
        assert retrieval.main(argv) == 0
    rows = json.loads(path.read_text())["rows"]
    assert len(measured) == 2 and {row["data"] for row in rows} == {"drawn 300", "drawn 400"}
    ours = [row for row in rows if row["index"] == "graph" and row["data"] == "drawn 400"]
    assert [row["effort"] for row in ours] == list(retrieval.SETTINGS["graph"])
    # Centres are compared beside keys.
    assert all(0 < row["recall"] <= 1 and 0 < row["scanned"] < 1.1 for row in rows)
