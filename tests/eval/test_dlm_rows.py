"""A batch of rows of very different lengths computes what the rows compute alone, and gives their tokens."""

from __future__ import annotations

import json

import pytest

from agentkv.eval import dlm_rows, speed

COMMAND = ["rows", "--n", "4", "--length", "24", "--gen-length", "12"]


def test_every_cache_computes_what_its_rows_need(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert speed.main([*COMMAND, "--grid", "none+klass,dual,freecache+threshold(0.9)", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in rows] == ["none+klass", "dual", "freecache+threshold(0.9)"]
    for row in rows:
        assert row["query_tokens"] == row["needed_tokens"] and row["excess"] == row["equal"] == 1.0
        assert row["forwards"] < row["forwards_alone"] and row["seconds_ratio"] > 0
    assert "needed" in capsys.readouterr().out


def test_rows_are_spread_over_all_lengths():
    rows = dlm_rows.prompts(16, 192, 64, 2, 0)
    gaps = [row.count(2) for row in rows]
    assert sorted(gaps) == dlm_rows.spread(4, 64, 16) and gaps != sorted(gaps)
    assert [len(row) - gap for row, gap in zip(rows, gaps, strict=True)] == dlm_rows.spread(8, 192, 16)
    assert dlm_rows.spread(8, 192, 16)[::15] == [8, 192] and dlm_rows.spread(4, 64, 1) == [4]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--gen-length", "3"], "--gen-length 3 is below the shortest row's 4; use 4 or more"),
        (["--grid", "guided"], "names no cache; write none+guided"),
        (["--grid", "freecash"], "did you mean freecache"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, told, capsys):
    assert speed.main([*COMMAND, *options]) == 2
    assert told in capsys.readouterr().err
