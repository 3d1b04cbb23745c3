"""A cache that lives beside one that is filled anew: what is counted, and two short episodes in a browser."""

from __future__ import annotations

import json

import pytest
import torch

from agentkv import play
from eval import persistent, wide
from eval.persistent import Arm, arm_row, new_tokens, step_rows


def step(seen: int, read: int, first: int, last: int, kv_bytes: int = 10, seconds: float = 1.0) -> dict:
    """A step that shows screenshots `first` to `last` of 2 x 3 tokens, and says 4 tokens."""
    return {
        "tokens_seen": seen, "prefill_tokens": read, "decode_tokens": 4, "kv_bytes": kv_bytes,
        "seconds_prefill": seconds, "seconds_decode": 0.5,
        "frames": [{"step": number, "grid": [2, 3]} for number in range(first, last + 1)],
    }  # fmt: skip


def episode(*steps: dict, success: bool = True) -> dict:
    return {"success": success, "steps": list(steps)}


GROWING = [step(20, 20, 0, 0), step(34, 11, 0, 1), step(42, 11, 1, 2), step(50, 10, 2, 3)]
"""Each turn is 10 tokens, and the answer before it 4; from the third on a screenshot of 6 leaves."""


def test_new_tokens_are_those_of_the_turn_whatever_left():
    assert [new_tokens(now, before) for before, now in zip([None, *GROWING], GROWING, strict=False)] == [20, 10, 10, 10]


def test_an_arm_beside_the_fresh_one():
    again = [step(20, 20, 0, 0, 12, 3.5), step(34, 34, 0, 1, 12, 3.5), step(42, 42, 1, 2, 12, 3.5)]
    fresh = Arm("fresh", "full", 1.0, {0: episode(*again, success=False), 1: episode(*again)})
    grows = Arm("persistent", "full", 1.0, {0: episode(*GROWING), 1: episode(*GROWING)})
    row = arm_row(grows, fresh, history=2)
    assert row["success"] == 1 and row["difference"] == 0.5 and row["n"] == 2
    assert row["prefill_ratio"] == pytest.approx(32 / 30) and row["bytes_spread"] == 0
    assert row["seconds_ratio"] is None  # nothing beside it has five steps
    assert arm_row(fresh, fresh, 2)["prefill_ratio"] == pytest.approx(76 / 20)
    going = [r["going"] for r in step_rows(Arm("fresh", "full", 1.0, {0: episode(*again[:2], success=False)}))]
    assert going == [1.0, 1.0]


@pytest.mark.browser
def test_all_play_and_only_one_reads_again(tmp_path):
    file, picture, out = tmp_path / "rows.json", tmp_path / "steps.png", tmp_path / "runs"
    asked = ["--episodes", "1", "--max-steps", "3", "--methods", "gui-kv", "--history", "2", "--out", str(out)]
    asked += ["--caches", "persistent,changes"]
    for _ in range(2):  # the second time nothing is played any more
        assert persistent.main([*asked, "--json", str(file), "--plot", str(picture)]) == 0
    fresh, living, differing, *steps = json.loads(file.read_text())["rows"]
    assert [row["cache"] for row in (fresh, living, differing)] == ["fresh", "persistent", "changes"]
    assert fresh["prefill_ratio"] > 1.5 and living["prefill_ratio"] < 1.1
    assert differing["prefill_ratio"] < living["prefill_ratio"]
    assert [row["step"] for row in steps] == [1, 2, 3] * 3 and picture.stat().st_size > 1000


def test_wide_weights_have_the_shapes_of_the_published_model(monkeypatch):
    monkeypatch.setattr(wide, "TEXT", wide.TEXT | {"intermediate_size": 8})
    monkeypatch.setattr(wide, "VISION", wide.VISION | {"intermediate_size": 8})
    agent = wide.wide_agent(1, "cpu")
    text = agent.model.config.text_config
    assert (text.hidden_size, text.num_attention_heads, text.num_key_value_heads) == (3584, 28, 4)
    assert agent.model.dtype == torch.float32 and len(agent.model.model.visual.blocks) == 1


def test_random_weights_do_not_go_on_in_a_models_folder(tmp_path):
    asked = ["--max-steps", "1", "--out", str(tmp_path)]
    plain, wide = (
        persistent.plan_of(persistent.parser().parse_args([*asked, *more])) for more in ([], ["--wide", "1"])
    )
    assert plain.model == "mini-growing" and plain.device
    play.open_folder(tmp_path / "fresh", plain, True, {}, [])
    with pytest.raises(ValueError, match="another --out"):
        play.open_folder(tmp_path / "fresh", wide, True, {}, [])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--task", "live"], "envs.task_ids"), (["--task", "nothing"], "nothing"), (["--budget", "40"], "0.4")],
)
def test_a_wrong_request_is_one_line(arguments, says, tmp_path, capsys):
    assert persistent.main([*arguments, "--out", str(tmp_path / "runs")]) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1
