"""Many conversations through a server: what the command counts, on a few short ones."""

from __future__ import annotations

import json

import pytest

from eval import serving


def test_every_answer_is_the_librarys_and_the_limit_holds(tmp_path):
    file = tmp_path / "rows.json"
    asked = ["--conversations", "4", "--steps", "3", "--holds", "2", "--words", "8", "--answer", "4"]
    assert serving.main([*asked, "--methods", "full", "--clients", "2", "--requests", "4", "--json", str(file)]) == 0
    again = file.stat().st_mtime_ns
    assert serving.main([*asked, "--methods", "full", "--clients", "2", "--requests", "4", "--json", str(file)]) == 0
    assert file.stat().st_mtime_ns == again  # it is whole: nothing is measured once more
    dropped, kept, load = json.loads(file.read_text())["rows"]
    for row in (dropped, kept):
        assert row["answers_equal"] == row["n"] == 12
        assert row["kv_bytes_peak"] <= row["memory"]
        assert row["prefill_tokens"] < row["prefill_tokens_full"]
        # What is played through by formula is what happens.
        assert row["found_memory"] == pytest.approx(row["found_memory_simulated"], abs=0.13)
    assert not dropped["found_disk"] and kept["found_memory"] + kept["found_disk"] == 1
    assert kept["prefill_tokens"] < dropped["prefill_tokens"]
    assert load["clients"] == 2 and load["n"] == 4 * serving.ROUNDS and load["p50"] <= load["p95"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--budget", "40"], "0.4"),
        (["--clients", "0"], "number of clients"),
        (["--model", "nowhere"], "nowhere"),
        (["--peer", "--model", "mini"], "mini-text"),
    ],
)
def test_a_wrong_request_is_one_line(arguments, says, capsys):
    assert serving.main(arguments) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1
