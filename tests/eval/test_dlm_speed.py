"""What a step of diffusion decoding costs outside the model: counted between the forwards, and one is not enough."""

from __future__ import annotations

import json

import pytest
import torch

from agentkv.eval import dlm_speed, speed
from dlm.decode import decode

COMMAND = ["dlm", "--models", "mini", "--length", "8", "--gen-length", "8", "--steps", "4", "--rounds", "1"]


def test_a_row_for_each_cache_counts_the_steps_between_forwards(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert speed.main([*COMMAND, "--caches", "none,dual", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["model"], row["method"], row["n"]) for row in rows] == [("mini", "none", 4), ("mini", "dual", 4)]
    for row in rows:
        # The loop, the rule and the cache are a small part of what a model of a few layers calls.
        assert 0 < row["calls"] < row["calls_forward"]
        assert row["overhead"] == row["seconds_outside"] / row["seconds_forward"] > 0
    assert "calls outside" in capsys.readouterr().out


def test_the_model_is_left_as_it_was():
    model = dlm_speed.shaped("mini", None, "cpu")
    watch = dlm_speed.Watch(model)
    with watch.watching():
        decode(model, torch.tensor([[5, 6]]), gen_length=3, eos="none", cache="none")
    assert len(watch.inside) == 3 and len(watch.outside) == 2 and "forward" not in vars(model)


@pytest.mark.parametrize("option", ["--gen-length", "--steps"])
def test_one_forward_has_nothing_between(option, capsys):
    assert speed.main([*COMMAND, option, "1"]) == 2
    assert f"{option} 1: what is between two forwards is measured; use 2 or more" in capsys.readouterr().err
