"""The command that says what a conversation weighs: against a real one, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from agentkv import size
from agentkv.models import load_adapter
from textkv import MethodCache


@pytest.mark.parametrize("budget", ["0.2", "1"])
def test_the_mini_agent_weighs_what_is_computed(budget):
    adapter = load_adapter("mini")
    shots = [Image.new("RGB", (400, 300), colour) for colour in ("red", "blue")]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "look"}]}]
    prompt = adapter.chat(messages, shots)
    model = size.Model.read("mini", (400, 300))
    assert [end - start for start, end in prompt.spans] == [model.image_tokens] * 2
    cache = MethodCache(adapter.model, "gui-kv", budget)
    cache.begin(**prompt.inputs, spans=[prompt.spans])
    with torch.inference_mode():
        adapter.model(**prompt.inputs, past_key_values=cache)
    assert model.shape.kv_bytes("gui-kv", budget, prompt.inputs["input_ids"].shape[1]) == cache.kv_bytes()


def test_the_command_prints_and_writes(tmp_path, capsys):
    file = tmp_path / "rows.json"
    asked = ["--screenshots", "2", "--budget", "0.2,1", "--memory", "100MB,1GB", "--crowd", "5,50", "--json", str(file)]
    assert size.main([*asked, "--rates", "4000,50,1GB", "--disk", "10MB"]) == 0
    told = json.loads(file.read_text())
    assert len(told["rows"]) == 4 and len(told["crowd"]) == 8
    small, large = told["rows"][0], told["rows"][2]
    assert small["kv_bytes"] < large["kv_bytes"] and small["conversations"] > large["conversations"]
    assert all(0 < row["seconds_step"] <= row["seconds_step_full"] for row in told["crowd"][:2])
    assert "0.2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--budget", "40"], "0.4 for 40 %"),
        (["--screen", "12"], "1280x720"),
        (["--memory", "8"], "no size"),
        (["--rates", "1,2"], "three rates"),
        (["--rates", "a,1,1GB", "--crowd", "2"], "rates"),
        (["--rates", "0,1,1GB", "--crowd", "2"], "rate of read"),
        (["--rates", "1,1,1GB"], "--crowd"),
        (["--method", "gear"], "no formula"),
        (["--model", "nowhere"], "nowhere"),
        (["--model", "mini-text"], "--screenshots 0"),
        (["--screenshots", "50"], "reads"),
    ],
)
def test_a_wrong_request_is_one_line(arguments, says, capsys):
    assert size.main(arguments) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1
