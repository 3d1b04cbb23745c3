"""Requests answered together: each says what it says alone, comes and goes by itself, and is told at once."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.textkv import kinds, tiny
from tests.textkv.serve.live import mini_engine
from tests.textkv.serve.test_app import Letters
from tests.textkv.serve.test_short_turns import Characters
from textkv.serve import Cancelled, ChatEngine, Engine, Outcome, rows
from textkv.serve.protocol import read_request
from textkv.serve.queue import Job, Turns
from textkv.serve.rows import Ask

TEXTS = ("hello", "a much longer question than the first one was", "and", "what of rows in between?")


@pytest.fixture(scope="module")
def model():
    return tiny.build("llama")


def engine_of(model, method="full", budget=None, tokenizer=None, **options):
    options = {"answer_tokens": 8, "rows": 4} | options
    return ChatEngine(model, tokenizer or Letters(), method, budget, **options)


def request(*texts, **more):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return read_request({"model": "m", "messages": messages, "temperature": 0} | more)


def together(engine, requests, cancelled=None, late=0):
    """(text that was given out, how it ended) of each, and the order in which they ended. The last `late` come one by
    one, each a step after the one before."""
    said, ends, order = [[] for _ in requests], {}, []

    def ask(number):
        def done(end):
            ends[number] = end
            order.append(number)

        gone = cancelled[number] if cancelled else lambda: False
        return Ask(engine.prepare(requests[number]), said[number].append, gone, done)

    waiting = [ask(number) for number in range(len(requests))]
    begun = []

    def more(places):
        count = min(places, 1 if begun else len(waiting) - late, len(waiting))
        begun.append(count)
        return [waiting.pop(0) for _ in range(count)]

    engine.answer_rows(more)
    assert not waiting
    return [("".join(pieces), ends[number]) for number, pieces in enumerate(said)], order


def test_an_engine_that_knows_no_rows_answers_one_after_the_other(model):
    class OneByOne(ChatEngine):
        answer_rows = Engine.answer_rows

    requests = [request(text) for text in TEXTS]
    expected, _ = together(engine_of(model), requests)
    one_by_one = OneByOne(model, Letters(), "full", None, answer_tokens=8)
    found, order = together(one_by_one, requests, [lambda number=number: number == 1 for number in range(len(TEXTS))])
    assert order == [0, 1, 2, 3] and isinstance(found[1][1], Cancelled)
    assert [found[n] for n in (0, 2, 3)] == [expected[n] for n in (0, 2, 3)]


def alone(engine, one):
    """As `model.generate` answers it, without any of the rows' code."""
    return engine.answer(engine.prepare(one), lambda text: None, lambda: False)


METHODS = [
    ("full", None), ("snapkv", 0.5), ("streaming_llm", 0.5), ("h2o", 0.5), ("kivi(4)", None), ("snapkv+adakv", 0.5),
    ("tova", 0.5), ("quest", 0.5), ("pyramidkv", 0.5), ("expected", 0.5),
]  # fmt: skip


@pytest.mark.parametrize(("method", "budget"), METHODS)
@pytest.mark.parametrize("late", [0, 3])
def test_every_row_says_what_it_says_alone(model, method, budget, late):
    asked = [request(text, max_tokens=5 + n) for n, text in enumerate(TEXTS)]
    found, _ = together(engine_of(model, method, budget), asked, late=late)
    for one, (text, end) in zip(asked, found, strict=True):
        assert end == alone(engine_of(model, method, budget), one) and text == end.text


def test_rows_of_the_embedded_model_say_what_they_say_alone():
    asked = [request(text, max_tokens=12) for text in TEXTS]
    found, _ = together(mini_engine(), asked, late=2)
    assert [end for _, end in found] == [alone(mini_engine(), one) for one in asked]


@pytest.mark.parametrize(("method", "budget"), METHODS[:4])
def test_conversations_go_on_in_any_company(model, method, budget):
    """Turn after turn, each answered beside others: the answers and the tokens found are those of one alone."""
    engine, single = (engine_of(model, method, budget, Characters()) for _ in range(2))
    talks = [[chr(0x110 + n) * (3 + n)] for n in range(4)]
    for turn in range(4):
        asked = [request(*talk, max_tokens=3 + (turn + n) % 3) for n, talk in enumerate(talks)]
        found, _ = together(engine, asked, late=turn)
        for talk, one, (_, end) in zip(talks, asked, found, strict=True):
            assert end == alone(single, one) and (end.cached_tokens > 0) == (turn > 0)
            talk += [end.text, chr(0x130 + turn) * 2]
    assert vars(engine.shelf.stats) == vars(single.shelf.stats)


@pytest.mark.parametrize(
    "more", [{"temperature": 1.5, "seed": 3}, {"frequency_penalty": 2.0}, {"temperature": 0.9, "top_p": 0.5, "seed": 9}]
)
def test_what_is_drawn_or_punished_is_so_in_any_company(model, more):
    asked = [request("hello", **more), request(TEXTS[1]), request(TEXTS[2], temperature=1.0)]
    found, _ = together(engine_of(model), asked)
    assert found[0][1] == alone(engine_of(model), asked[0]) and found[1][1] == alone(engine_of(model), asked[1])


def test_each_row_ends_by_itself_and_is_told_at_once(model):
    engine = engine_of(model)
    stop = alone(engine, request(TEXTS[1])).text[2:4]
    asked = [request(TEXTS[0]), request(TEXTS[1], stop=stop), request(TEXTS[2], max_tokens=2)]
    found, order = together(engine, asked)
    assert [end.reason for _, end in found] == ["length", "stop", "length"] and order[-1] == 0
    assert found[1][1] == alone(engine_of(model), asked[1]) and found[2][1].completion_tokens == 2


def test_a_client_that_leaves_frees_its_row_within_one_step_and_the_others_go_on(model):
    steps = []

    def gone():
        steps.append(1)
        return len(steps) >= 3

    asked = [request(text) for text in TEXTS[:2]]
    found, order = together(engine_of(model), asked, [gone, lambda: False])
    # Once when it joined, and behind each of its tokens.
    assert isinstance(found[0][1], Cancelled) and order == [0, 1] and len(steps) == 3
    assert found[1][1] == alone(engine_of(model), asked[1])


def forwards_of(model, work):
    seen = []
    handle = model.register_forward_hook(lambda *args: seen.append(1))
    try:
        return work(), len(seen)
    finally:
        handle.remove()


def test_one_forward_reads_a_token_of_all(model):
    engine = engine_of(model)
    _, count = forwards_of(model, lambda: together(engine, [request(text) for text in TEXTS]))
    assert count == 8
    # One that joins two steps later is through two steps later.
    _, count = forwards_of(model, lambda: together(engine, [request(text) for text in TEXTS[:3]], late=2))
    assert count == 10


def test_when_all_have_left_nothing_more_is_computed(model):
    engine, left = engine_of(model), []

    def gone():
        left.append(1)
        return len(left) > 4  # all have joined by then

    asked = [request(text, max_tokens=100) for text in TEXTS]
    (found, _), count = forwards_of(model, lambda: together(engine, asked, [gone] * 4))
    assert all(isinstance(end, Cancelled) for _, end in found) and count == 1
    found, _ = together(engine, asked, [lambda: True] * 4)
    assert all(isinstance(end, Cancelled) for _, end in found)


def test_prompts_are_read_as_far_as_there_is_room(model, monkeypatch):
    monkeypatch.setattr(rows, "READ", 30)
    engine, seen = engine_of(model), []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    asked = [request("x" * n, max_tokens=3) for n in (60, 10, 10, 10)]
    try:
        found, _ = together(engine, asked)
    finally:
        handle.remove()
    # "<" and ">" stand around each. The first is longer than the room, and is read by itself.
    assert seen[:3] == [62, 1 + 12 + 12, 1 + 1 + 1 + 12]
    assert [end for _, end in found] == [alone(engine_of(model), one) for one in asked]


def test_what_goes_wrong_in_one_row_ends_that_row_alone(model, monkeypatch):
    engine = engine_of(model)
    asked = [request(text) for text in TEXTS]

    class Breaks(torch.nn.Module):
        def __call__(self, ids, scores):
            if ids.shape[1] > 9:
                raise ValueError("cannot go on")
            return scores

    prepare = engine.prepare
    broken = prepare(asked[0])
    broken.options["logits_processor"] = [Breaks()]
    monkeypatch.setattr(engine, "prepare", lambda one: broken if one is asked[0] else prepare(one))
    found, order = together(engine, asked)
    assert str(found[0][1]) == "cannot go on" and order[0] == 0
    assert [end for _, end in found[1:]] == [alone(engine_of(model), one) for one in asked[1:]]


def test_an_error_at_the_end_of_a_row_is_its_own(model, monkeypatch):
    """Keeping its conversation fails, as when the machine has no memory for a copy."""
    engine, asked = engine_of(model), [request(text, max_tokens=3 + n) for n, text in enumerate(TEXTS)]
    expected, _ = together(engine_of(model), asked)
    put, kept = engine.shelf.put, []

    def breaks(talk, owner):
        kept.append(talk)
        if len(kept) == 2:
            raise RuntimeError("out of memory")
        put(talk, owner)

    monkeypatch.setattr(engine.shelf, "put", breaks)
    found, order = together(engine, asked)
    assert order == [0, 1, 2, 3] and isinstance(found[1][1], RuntimeError)
    assert [found[n] for n in (0, 2, 3)] == [expected[n] for n in (0, 2, 3)]


def test_a_forward_that_fails_is_read_again_row_by_row(model, monkeypatch):
    """Inside a layer, when some caches have the tokens already and others have not."""
    engine, mean = engine_of(model), []
    real = type(model.model.layers[1]).forward

    def forward(self, hidden_states, *args, **kwargs):
        mean.append(1)
        if self is model.model.layers[1] and hidden_states.shape[1] == 4 and len(mean) < 12:
            raise RuntimeError("broken")
        return real(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(type(model.model.layers[1]), "forward", forward)
    asked = [request(text) for text in TEXTS]
    found, _ = together(engine, asked)
    monkeypatch.undo()
    assert [end for _, end in found] == [alone(engine_of(model), one) for one in asked]


def test_which_models_read_several_texts_at_once(model):
    assert engine_of(model).rows == 4 and engine_of(model, rows=None).rows == 16 and engine_of(model, rows=1).rows == 1
    # States are of a row.
    assert [engine_of(kinds.model_of_kind(kind)).rows for kind in ("sliding", "sinks", "hybrid")] == [4, 4, 1]


class Loop:
    """In place of an event loop: what it is handed is done at once."""

    def is_closed(self):
        return False

    def call_soon_threadsafe(self, call, *args):
        call(*args)


class Noting(ChatEngine):
    """Notes how many are answered at a step; the first step waits until it may go on."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.joined, self.begun, self.open = [], threading.Event(), threading.Event()

    def answer(self, prepared, give, cancelled):
        self.joined.append("alone")
        return super().answer(prepared, give, cancelled)

    def answer_rows(self, more):
        def noting(places):
            found = more(places)
            self.joined.append(len(found)) if found else None
            self.begun.set()
            self.open.wait(20)
            return found

        super().answer_rows(noting)

    def joins(self, prepared):
        return super().joins(prepared) and prepared.options["max_new_tokens"] != 3


def test_those_that_wait_join_clients_in_turn_and_what_cannot_waits_for_its_turn_alone(model):
    engine = Noting(model, Letters(), answer_tokens=4, rows=3)
    turns = Turns(engine)
    # The question of three tokens is one that must be answered alone.
    clients = {"a": [4, 4], "b": [4, 3, 4], "c": [4]}
    order = [(client, tokens) for client, several in clients.items() for tokens in several]
    try:
        jobs, ended = [], []
        for number, (client, tokens) in enumerate(order):
            asked = request(f"question {number}", max_tokens=tokens)
            jobs.append(Job(client, engine.prepare(asked), Loop()))
            turns.add(jobs[-1])
            engine.begun.wait(20)
        engine.open.set()
        for job in jobs:
            while not isinstance(end := waited(job), Outcome):
                assert not isinstance(end, Exception), end
            ended.append(end)
    finally:
        engine.open.set()
        turns.close()
    # a's first, then one of each as there is room, up to b's second, which goes alone; then b's third.
    assert engine.joined == [1, 2, 1, "alone", 1]
    for number, (end, (_, tokens)) in enumerate(zip(ended, order, strict=True)):
        assert end.text == alone(engine_of(model), request(f"question {number}", max_tokens=tokens)).text


def waited(job):
    """A job's next piece, from the thread that answers it."""
    while job.pieces.empty():
        threading.Event().wait(0.01)
    return job.pieces.get_nowait()
