"""What a user has on disk stays, and what was measured survives: commands run to their end, on places that fail."""

import json
import os
from pathlib import Path

import pytest

from agentkv.eval import perplexity, retrieval
from agentkv.eval.outcomes import Outcomes
from dlm import generate
from training.dlm import evaluate

QUICK = {
    "eval.perplexity": (perplexity, "--model mini --methods window --cache 32 --tokens 96 --stretches 2"),
    "eval.retrieval": (retrieval, "--tokens 0 --drawn 200 --asked 4 --degree 4"),
    "dlm.generate": (generate, "--prompt 1+1= --gen-length 4"),
    "training.dlm.evaluate": (evaluate, "--n 1 --gen-length 8"),
}


def argv_of(command, *more):
    return [*QUICK[command][1].split(), *map(str, more)]


@pytest.mark.parametrize("command", QUICK)
def test_a_missing_folder_is_made_and_an_own_file_replaced(command, tmp_path, capsys, reliability):
    path = tmp_path / "new" / "folder" / "rows.json"
    for _ in range(2):
        assert QUICK[command][0].main(argv_of(command, "--json", path)) == 0
        assert json.loads(path.read_text())["rows"]
    assert [x.name for x in path.parent.iterdir()] == ["rows.json"]
    reliability(1, "missing folder", command, "made, nothing left beside the file")
    reliability(1, "own earlier file", command, "replaced as a whole")


@pytest.mark.parametrize("command", QUICK)
def test_figures_survive_a_disk_that_fills_up_meanwhile(command, tmp_path, capsys, monkeypatch, reliability):
    path = tmp_path / "rows.json"
    before = json.dumps({"meta": {"command": f"python -m {command}"}, "rows": []})
    path.write_text(before)

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    assert QUICK[command][0].main(argv_of(command, "--json", path)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "could not be written (No space left on device); the results are in " in last
    rescued = Path(last.rsplit(" ", 1)[1])
    assert json.loads(rescued.read_text())["rows"] and path.read_text() == before
    rescued.unlink()
    reliability(1, "disk full while the results are written", command, "kept in a file that is told, exit 2")


@pytest.mark.parametrize("content", ["my thesis", '{"chapters": 7}', '{"board": {"model": "mine"'])
def test_a_strangers_lines_without_an_end_are_kept(content, tmp_path, reliability):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="is no file of outcomes; give another --json"):
        Outcomes(path, {"model": "mini"})
    assert path.read_text() == content
    reliability(1, "stranger's lines without an end", "eval.board, eval.conversations", "refused, kept")


def test_an_own_file_that_was_cut_in_its_first_line_is_begun_anew(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"board": {"mod')
    assert Outcomes(path, {"model": "mini"}).done == {} and not path.exists()


@pytest.mark.parametrize("content", ["my thesis", '{"chapters": 7}', '{"line": "of a poem"', '{"text": "x"}\n'])
def test_answers_never_replace_a_strangers_lines(content, tmp_path, capsys, reliability):
    (tmp_path / "in.jsonl").write_text('{"prompt": "1+1="}\n')
    out = tmp_path / "out.jsonl"
    out.write_text(content)
    argv = ["--batch", str(tmp_path / "in.jsonl"), "--out", str(out), "--gen-length", "4"]
    assert generate.main(argv) == 2
    assert capsys.readouterr().err.count("\n") == 1 and out.read_text() == content
    reliability(1, "stranger's lines without an end", "dlm.generate --batch", "refused, kept")
