"""Requests answered as rows of one cache: each says what it says alone, ends by itself, and is told at once."""

from __future__ import annotations

import threading

import pytest

from tests.textkv import tiny
from tests.textkv.serve.live import mini_engine
from tests.textkv.serve.test_app import Letters
from textkv.serve import Cancelled, ChatEngine, Outcome
from textkv.serve.protocol import read_request
from textkv.serve.queue import Job, Turns

TEXTS = ("hello", "a much longer question than the first one was", "and", "what of rows in between?")


@pytest.fixture(scope="module")
def model():
    return tiny.build("llama")


def engine_of(model, method="full", budget=None, **options):
    return ChatEngine(model, Letters(), method, budget, answer_tokens=8, rows=4, **options)


def request(*texts, **more):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return read_request({"model": "m", "messages": messages, "temperature": 0} | more)


def together(engine, requests, cancelled=None):
    """(text that was given out, how it ended) of each, and the order in which they ended."""
    several = [engine.prepare(one) for one in requests]
    said, ends, order = [[] for _ in several], {}, []

    def done(number, end):
        ends[number] = end
        order.append(number)

    gone = cancelled or [lambda: False] * len(several)
    engine.answer_rows(several, [pieces.append for pieces in said], gone, done)
    return [("".join(pieces), ends[number]) for number, pieces in enumerate(said)], order


def alone(engine, one):
    return engine.answer(engine.prepare(one), lambda text: None, lambda: False)


@pytest.mark.parametrize(
    ("method", "budget"),
    [("full", None), ("snapkv", 0.5), ("streaming_llm", 0.5), ("h2o", 0.5), ("kivi(4)", None), ("snapkv+adakv", 0.5)],
)
def test_every_row_says_what_it_says_alone(model, method, budget):
    asked = [request(text, max_tokens=5 + n) for n, text in enumerate(TEXTS)]
    found, _ = together(engine_of(model, method, budget), asked)
    for one, (text, end) in zip(asked, found, strict=True):
        assert end == alone(engine_of(model, method, budget), one) and text == end.text


def test_rows_of_the_embedded_model_say_what_they_say_alone():
    engine = mini_engine()
    asked = [request(text, max_tokens=12) for text in TEXTS]
    found, _ = together(engine, asked)
    assert [end for _, end in found] == [alone(mini_engine(), one) for one in asked]


def test_each_row_ends_by_itself_and_is_told_at_once(model):
    engine = engine_of(model)
    stop = alone(engine, request(TEXTS[1])).text[2:4]
    asked = [request(TEXTS[0]), request(TEXTS[1], stop=stop), request(TEXTS[2], max_tokens=2)]
    found, order = together(engine, asked)
    assert [end.reason for _, end in found] == ["length", "stop", "length"] and order[-1] == 0
    assert found[1][1] == alone(engine_of(model), asked[1]) and found[2][1].completion_tokens == 2


def test_a_client_that_leaves_hears_it_within_one_step_and_the_others_go_on(model):
    steps = []

    def gone():
        steps.append(1)
        return len(steps) >= 3

    asked = [request(text) for text in TEXTS[:2]]
    found, order = together(engine_of(model), asked, [gone, lambda: False])
    assert isinstance(found[0][1], Cancelled) and order == [0, 1] and len(steps) == 3
    assert found[1][1] == alone(engine_of(model), asked[1])


def test_when_all_have_left_nothing_more_is_computed(model):
    engine, forwards = engine_of(model), []
    handle = model.register_forward_hook(lambda *args: forwards.append(1))
    try:
        found, _ = together(engine, [request(text, max_tokens=100) for text in TEXTS], [lambda: True] * 4)
    finally:
        handle.remove()
    assert all(isinstance(end, Cancelled) for _, end in found) and len(forwards) == 1


def test_what_does_not_stand_alone_is_answered_in_turn(model):
    engine = engine_of(model)
    first = engine.prepare(request("hello"))
    assert engine.joins([first], engine.prepare(request("other")))
    for other in (
        request("hello", "yes", "and?"),
        request("hello", temperature=0.7),
        request("hello", frequency_penalty=1.0),
    ):
        assert not engine.joins([first], engine.prepare(other))
    limit = engine._limit
    long = engine.prepare(request("x" * (limit - 30), max_tokens=8))
    assert engine.joins([first], long)
    assert not engine.joins([engine.prepare(request("hello", max_tokens=limit - 10))], long)


class Loop:
    """An event loop that does at once what it is told to do."""

    def is_closed(self):
        return False

    def call_soon_threadsafe(self, call, *args):
        call(*args)


class Noting(ChatEngine):
    """Notes who was answered together; the first answer waits until it may go on."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.groups, self.begun, self.open = [], threading.Event(), threading.Event()

    def answer(self, prepared, give, cancelled):
        self.groups.append(1)
        self.begun.set()
        self.open.wait(20)
        return super().answer(prepared, give, cancelled)

    def answer_rows(self, several, *more):
        self.groups.append(len(several))
        super().answer_rows(several, *more)


def test_those_that_wait_together_are_answered_together_clients_in_turn(model):
    engine = Noting(model, Letters(), answer_tokens=4, rows=3)
    turns = Turns(engine)
    clients = ["a", "b", "b", "c", "d", "d"]
    try:
        jobs = []
        for number, client in enumerate(clients):
            jobs.append(Job(client, engine.prepare(request(f"question {number}")), Loop()))
            turns.add(jobs[-1])
            engine.begun.wait(20)
        engine.open.set()
        ends = []
        for job in jobs:
            while not isinstance(end := job.pieces.get_nowait() if not job.pieces.empty() else "", Outcome):
                assert not isinstance(end, Exception), end
            ends.append(end)
    finally:
        engine.open.set()
        turns.close()
    # The first was alone; then one of each waiting client, then what is left of them.
    assert engine.groups == [1, 3, 2]
    for number, end in enumerate(ends):
        assert end.text == alone(engine_of(model), request(f"question {number}", max_tokens=4)).text
