"""Chats with pictures answered together: each says what it says alone, whoever brings pictures beside it."""

from __future__ import annotations

import pytest

from agentkv.models import AGENTS
from agentkv.serving import VisionEngine
from tests.agentkv.models.tiny import tiny
from tests.agentkv.test_serving import noise, shown
from tests.textkv.serve.test_rows import alone, together
from textkv.serve import Opening
from textkv.serve.protocol import read_request

SYSTEM = {"role": "system", "content": "You are a GUI agent."}
METHODS = [("full", None), ("gui-kv", "0.4"), ("streaming_llm", "0.5"), ("kivi(4)", None)]


def request(messages, **more):
    return read_request({"model": "m", "messages": messages, "temperature": 0, "max_tokens": 8} | more)


def talks_of(*pictures):
    """Conversations that begin with so many pictures each."""
    return [
        [SYSTEM, *(shown(noise(10 * number + n), f"Click on {number}.") for n in range(count))]
        if count
        else [{"role": "user", "content": f"hello {number}"}]
        for number, count in enumerate(pictures)
    ]


def compared(engine, single, talks, turns=3):
    """Asserts turn after turn that all are answered as one by one. Row n joins n steps later in the second turn, and
    brings its picture while others decode."""
    for turn in range(turns):
        asked = [request(messages, max_tokens=4 + (turn + n) % 5) for n, messages in enumerate(talks)]
        found, _ = together(engine, asked, late=turn)
        for number, (messages, one, (_, end)) in enumerate(zip(talks, asked, found, strict=True)):
            assert end == alone(single, one)
            again = shown(noise(100 * turn + number)) if number % 2 else {"role": "user", "content": "and then?"}
            messages += [{"role": "assistant", "content": end.text}, again]
    assert vars(engine.shelf.stats) == vars(single.shelf.stats)


@pytest.mark.parametrize(("method", "budget"), METHODS)
def test_every_row_says_what_it_says_alone(method, budget):
    engine, single = (VisionEngine.open(Opening("mini", method=method, budget=budget)) for _ in range(2))
    assert engine.rows == 16
    compared(engine, single, talks_of(1, 2, 0, 1))
    assert engine.shelf.stats.continued > 2


@pytest.mark.parametrize("agent", ["qwen2.5-vl", "qwen3-vl", "opencua"])
def test_every_architecture_reads_pictures_of_several(agent):
    engine, single = (VisionEngine(tiny(AGENTS[agent]), "full") for _ in range(2))
    assert engine.rows == 16
    compared(engine, single, talks_of(1, 0, 2), turns=2)


def test_states_of_a_row_are_not_read_together():
    assert VisionEngine(tiny(AGENTS["qwen3.5"]), "full").rows == 1


def test_pictures_that_are_left_out_are_forgotten_in_any_company():
    engine, single = (VisionEngine.open(Opening("mini", method="gui-kv", budget="0.4")) for _ in range(2))
    talks = talks_of(2, 2)
    for turn in range(3):
        # A client that shows its newest picture alone.
        for messages in talks:
            older = [n for n, one in enumerate(messages) if isinstance(one["content"], list)][:-1]
            for n in older:
                messages[n] = messages[n] | {"content": messages[n]["content"][-1:]}
        asked = [request(messages) for messages in talks]
        found, _ = together(engine, asked, late=1)
        for number, (messages, one, (_, end)) in enumerate(zip(talks, asked, found, strict=True)):
            assert end == alone(single, one)
            messages += [{"role": "assistant", "content": end.text}, shown(noise(100 * turn + number))]
    forgotten = [sorted(int(held.forgotten.sum()) for held in one.shelf._kept) for one in (engine, single)]
    assert forgotten[0] == forgotten[1] and forgotten[0][0] > 100
