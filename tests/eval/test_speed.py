"""The cost of methods: measured on a tiny model, with the shapes' command refused where it must be."""

from __future__ import annotations

import pytest

from agentkv.eval import speed
from tests.textkv import tiny


def test_rows_hold_times_and_bytes_of_every_method() -> None:
    first, rows = speed.measure(tiny.build("llama"), ["snapkv", "full", "window"], "0.25", 64, 2, "cpu")
    assert [row["n"] for row in first] == [1, 1, 1] and first[1]["kv_bytes"] == rows[1]["kv_bytes"]
    assert [row["method"] for row in rows] == ["full", "snapkv", "window"]
    full, snap, _ = rows
    assert full["decode_ratio"] == 1.0 and full["budget"] == "1.0" and full["n"] == 2
    assert snap["tokens_stored"] == 16 and snap["floor_bytes"] == 16 * 2 * 2 * 16 * 4
    assert snap["floor_bytes"] * 3 <= snap["kv_bytes"] < 0.3 * snap["kv_bytes_full"]
    assert all(row["seconds_decode"] > 0 and 0 <= row["overhead"] < 1 for row in rows)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--methods", "snapkw"], "did you mean snapkv"),
        (["--layers", "0"], "0 is not a count; use 1"),
        (["--budget", "40"], "0.4"),
    ],
)
def test_bad_requests_are_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.main([*argv, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
