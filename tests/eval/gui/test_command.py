"""The command on a made sample with the embedded model: every question once, resume, groups, refusals."""

from __future__ import annotations

import json

from agentkv.eval.gui.__main__ import main
from tests.eval.gui.test_scores import SPOT, sample


def test_the_mini_model_answers_every_question_once(tmp_path, capsys):
    entries = [SPOT | {"instruction": f"Click on button {n}.", "platform": ("web", "phone")[n % 2]} for n in range(3)]
    folder = sample(tmp_path, [*entries, SPOT | {"bbox": 3}])
    command = ["--benchmark", "screenspot", "--data", str(folder), "--method", "full,gui-kv,star-kv", "--budget", "0.2",
               "--max-new-tokens", "6", "--json", str(tmp_path / "out" / "spot.json")]  # fmt: skip
    assert main([*command, "--limit", "2"]) == 0
    assert main(command) == 0
    lines = (tmp_path / "out" / "spot.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 3 * 3 and "bbox is not" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "spot.json").read_text())
    rows = {(row["method"], row["task"]): row for row in found["rows"]}
    assert {task for _, task in rows} == {"all", "web icon", "phone icon"}
    whole, kept = rows["full", "all"], rows["star-kv", "all"]
    assert whole["n"] == kept["n"] == 3 and whole["budget"] == 1.0 and kept["budget"] == 0.2
    assert 0.15 < kept["kv_share"] < 0.3 and whole["kv_share"] > 0.99 and whole["low"] <= whole["accuracy"]
    assert kept["accuracy_macro"] == kept["accuracy"] and kept["seconds"] > 0
    assert found["meta"]["left_out"] == ["data.json entry 3: bbox is not [left, top, right, bottom]; left out"]


def test_what_cannot_be_carried_out_is_one_line(tmp_path, capsys):
    folder = sample(tmp_path, [SPOT])
    start = ["--data", str(folder), "--json", str(tmp_path / "x.json")]
    for more, line in (
        (["--benchmark", "screenspots"], "did you mean screenspot"),
        (["--benchmark", "screenspot", "--method", "gui-vk"], "did you mean gui-kv"),
        (["--benchmark", "screenspot", "--budget", ","], "names nothing"),
    ):
        assert main([*start, *more]) == 2
        err = capsys.readouterr().err
        assert line in err and len(err.strip().splitlines()) == 1
