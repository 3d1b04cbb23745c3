"""The table of outcomes: counted, merged, and the page that stands in docs is the one drawn from its rows."""

import json

import pytest

from .measured import measured
from .rows import DOCS, Row, merge, page, read


def test_equal_rows_are_counted_and_those_of_a_test_replaced(tmp_path):
    seen = Row(7, "nan", "eval.needle", "refused", "tests/a.py")
    merge([seen, seen, Row(7, "inf", "eval.needle", "refused", "tests/b.py")], tmp_path)
    assert sorted((row.fault, row.n) for row in read(tmp_path / "reliability.json")) == [("inf", 1), ("nan", 2)]
    merge([seen], tmp_path)
    assert sorted((row.fault, row.n) for row in read(tmp_path / "reliability.json")) == [("inf", 1), ("nan", 1)]
    assert "| nan | refused | 1 | `eval.needle` | `tests/a.py` |" in (tmp_path / "reliability.md").read_text()


def test_a_kind_that_is_none_is_refused():
    with pytest.raises(ValueError, match="kind=10 is not one of 1, 2"):
        Row(10, "x", "y", "z", "w")


def test_the_long_measurements_are_rows_too(tmp_path):
    fuzzed = {"reader": "Spans", "accepted": 3, "refused": 4, "other": 0}
    (tmp_path / "fuzz.json").write_text(json.dumps({"meta": {}, "rows": [fuzzed]}))
    two = [1.0, 2.0]
    verdict = {"part": "texts", "done": 2000, "flat": True, "mb": two, "mb_below": [0, 0], "files": [9, 9], "rate": two}
    (tmp_path / "soak.json").write_text(json.dumps({"meta": {}, "rows": [], "verdicts": [verdict]}))
    told = {(row.command, row.outcome, row.n) for row in measured(tmp_path)}
    assert told == {
        ("Spans", "accepted", 3),
        ("Spans", "refused as promised", 4),
        ("texts", "flat: 1 to 2 MB, 9 to 9 open files, 1 to 2 a second of its own time", 1),
    }
    assert set(measured()) <= set(read())


def test_the_page_is_drawn_from_the_rows():
    rows = read()
    assert (DOCS / "reliability.md").read_text(encoding="utf-8") == page(rows)
    assert json.loads((DOCS / "reliability.json").read_text(encoding="utf-8"))["meta"]
