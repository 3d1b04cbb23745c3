"""Prompts answered together are answered as each alone, and an agent without weights asks whoever has them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from agentkv.agent import Agent
from agentkv.answering import SharedModel, answer
from agentkv.models import load_adapter

METHODS = ["full", "gui-kv", "snapkv", "h2o", "streaming_llm", "pyramidkv", "snapkv+adakv", "kivi(4)"]
GOALS = ["click the button", "click the second red button, please, and do it now", "x"]


@pytest.fixture(scope="module")
def mini():
    return load_adapter("mini", "cpu", torch.float32)


@pytest.fixture(scope="module")
def thin():
    return load_adapter("mini", "cpu", torch.float32, weights=False)


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (210, 160, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def asked(thin, mini, method, goals=GOALS, tokens=12):
    """What an agent without weights asks for each goal, as it travels to another process."""
    found = []

    def note(one):
        found.append(pickle.loads(pickle.dumps(one)))
        return answer(mini.model, one)

    agent = Agent(thin, method, "0.4", tokens, note)
    for number, goal in enumerate(goals):
        agent.start(None)
        agent.decide(goal, [], picture(number), (160, 210))
    return found


@pytest.mark.parametrize("method", ["gui-kv", "star-kv"])
def test_an_agent_without_weights_decides_as_one_with_them(mini, thin, method):
    shared = SharedModel(mini.model)
    agents = Agent(mini, method, "0.4", 12), Agent(thin, method, "0.4", 12, shared.one)
    history = []
    for step in range(3):
        both = [agent.decide("click it", history, picture(step), (160, 210)) for agent in agents]
        told = [{k: v for k, v in vars(one).items() if "seconds" not in k and k != "frames"} for one in both]
        assert told[0] == told[1] and both[0].kv_bytes > 0
        assert all((a.share == b.share).all() for a, b in zip(both[0].frames, both[1].frames, strict=True))
        history.append((picture(step), both[0].text))


@pytest.mark.parametrize("method", METHODS)
def test_rows_say_and_keep_what_each_does_alone(mini, thin, method):
    shared = SharedModel(mini.model)
    several = asked(thin, mini, method)
    lengths = [one.inputs["input_ids"].shape[1] for one in several]
    assert len(set(lengths)) == 3 and shared.joins(several[:2], several[2])
    for one, alone in zip(shared.several(several), map(shared.one, several), strict=True):
        assert one.tokens == alone.tokens and one.tokens_stored == alone.tokens_stored
        assert one.kv_bytes_full == alone.kv_bytes_full
        # Where whole blocks are packed, padding leaves more tokens for the next one.
        more = 1.35 if method.startswith("kivi") else 9 / 8
        assert alone.kv_bytes <= one.kv_bytes <= alone.kv_bytes * more
        assert alone.kv_bytes_peak * 0.95 < one.kv_bytes_peak < alone.kv_bytes_peak * 1.2
        for mine, its in zip(one.kept, alone.kept, strict=True):
            assert [sorted(x for x in head if x >= 0) for head in mine[0].tolist()] == [
                sorted(x for x in head if x >= 0) for head in its[0].tolist()
            ]


def test_what_does_not_fit_is_answered_in_turn(mini, thin):
    shared = SharedModel(mini.model)
    first, other = asked(thin, mini, "gui-kv", ["click it", "click that"])
    assert shared.joins([first], other)
    assert not shared.joins([first], asked(thin, mini, "snapkv", ["click it"])[0])
    assert not shared.joins([first], asked(thin, mini, "gui-kv", ["click it"], tokens=5)[0])
    # Much padding is work for nothing.
    assert not shared.joins([first], asked(thin, mini, "gui-kv", ["click it and " * 30])[0])
    # What a method learns from step to step is of one task.
    assert not shared.joins(*(lambda a, b: ([a], b))(*asked(thin, mini, "star-kv", ["click it", "click that"])))
