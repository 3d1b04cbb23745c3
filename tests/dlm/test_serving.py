"""Diffusion models behind the server: the same door, their own way of writing."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from starlette.testclient import TestClient

from dlm import decode, serving
from dlm.loop import Loop
from dlm.prompts import prompt_ids
from dlm.serving import DiffusionEngine
from tests.textkv.serve.test_rows import together
from textkv.serve import ENGINES, Cancelled, Opening, build_app
from textkv.serve.protocol import read_request
from textkv.serve.rows import Ask

PROBLEM = "tom has 37 apples. he buys 25. how many now?"


@pytest.fixture(scope="module")
def engine():
    return DiffusionEngine.open(Opening("mini", method="freecache"))


@pytest.fixture
def client(engine):
    with TestClient(build_app(engine, "mini")) as client:
        yield client


def body(**changed):
    messages = [{"role": "user", "content": PROBLEM}]
    return {"model": "mini", "messages": messages, "temperature": 0, "max_tokens": 64} | changed


def test_an_answer_is_that_of_the_library(client, engine):
    ids = prompt_ids(engine.tokenizer, PROBLEM, engine.tokenizer.chat_template is not None)
    done = decode(engine.model, torch.tensor([ids]), gen_length=64, cache="freecache")
    expected = engine.tokenizer.decode(done.ids[0], skip_special_tokens=True)
    told = client.post("/v1/chat/completions", json=body()).json()
    assert "62" in expected and told["choices"][0]["message"]["content"].strip() == expected.strip()
    assert told["choices"][0]["finish_reason"] == "stop" and told["usage"]["prompt_tokens"] == len(ids)


def test_a_stream_is_the_whole_answer_in_pieces(client):
    whole = client.post("/v1/chat/completions", json=body()).json()["choices"][0]["message"]["content"]
    lines = client.post("/v1/chat/completions", json=body(stream=True)).text.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    texts = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(texts) == whole and sum(map(bool, texts)) > 1


def test_a_stop_string_ends_the_answer(client):
    whole = client.post("/v1/chat/completions", json=body()).json()["choices"][0]["message"]["content"]
    word = whole.split()[-1]
    told = client.post("/v1/chat/completions", json=body(stop=[word])).json()["choices"][0]
    assert told["message"]["content"] == whole[: whole.index(word)] and told["finish_reason"] == "stop"


def test_what_a_diffusion_model_cannot_do_is_refused(client):
    told = client.post("/v1/chat/completions", json=body(frequency_penalty=1))
    assert told.status_code == 400 and "frequency_penalty" in told.json()["error"]["message"]
    told = client.post("/v1/chat/completions", json=body(response_format={"type": "json_object"}))
    assert told.status_code == 400 and "response_format" in told.json()["error"]["message"]
    picture = [{"type": "image_url", "image_url": "data:image/png;base64,AAAA"}]
    told = client.post("/v1/chat/completions", json=body(messages=[{"role": "user", "content": picture}]))
    assert told.status_code == 400 and "text only" in told.json()["error"]["message"]


def test_what_is_longer_than_the_model_reads_is_said_and_an_empty_text_is_answered(client):
    told = client.post("/v1/chat/completions", json=body(max_tokens=4_096))
    assert told.status_code == 400 and "generate at most 2033" in told.json()["error"]["message"]
    long = client.post("/v1/chat/completions", json=body(messages=[{"role": "user", "content": "a " * 3_000}]))
    assert long.status_code == 400 and long.json()["error"]["code"] == "context_length_exceeded"
    empty = client.post("/v1/chat/completions", json=body(messages=[{"role": "user", "content": ""}]))
    assert empty.status_code == 200


def test_a_budget_and_an_unknown_cache_are_refused_before_weights_are_read():
    with pytest.raises(ValueError, match="cache policy"):
        DiffusionEngine.check(Opening("nowhere", budget="0.4"))
    with pytest.raises(ValueError, match="frecache"):
        DiffusionEngine.check(Opening("nowhere", method="frecache"))


def test_every_class_of_the_wing_is_served_with_its_own_cache(tmp_path):
    from dlm.check_models import SMALL, TOKENS
    from dlm.models.loading import MODELS

    assert set(DiffusionEngine.reads) == set(MODELS)
    kind = MODELS["sdar"]
    torch.manual_seed(0)
    model = kind(kind.config_class(**SMALL["sdar"], **TOKENS)).eval()
    engine = DiffusionEngine(model, Bytes())
    given = []
    outcome = engine.answer(engine.prepare(read_request(body(max_tokens=8))), given.append, lambda: False)
    assert outcome.completion_tokens <= 8 and "".join(given) == outcome.text


PROBLEMS = (
    PROBLEM,
    "ann has 9 pens and 4 more. how many?",
    "ben has 80 books. he gives 31 away. he buys 7. how many now?",
)


@pytest.mark.parametrize("name", ["mini", "mini-dream"])
@pytest.mark.parametrize("more", [{}, {"temperature": 0.8, "seed": 4}, {"stop": ["+"]}])
def test_requests_that_share_a_canvas_get_what_they_get_alone(name, more):
    engine = DiffusionEngine.open(Opening(name))
    texts = [*PROBLEMS, PROBLEMS[1]]
    asked = [
        read_request(body(messages=[{"role": "user", "content": text}]) | more | {"max_tokens": 32 + 32 * (n == 3)})
        for n, text in enumerate(texts)
    ]
    found, order = together(engine, asked, late=1)
    # The last comes when the canvas of the first is full.
    assert order[3] == 3
    for one, (text, end) in zip(asked, found, strict=True):
        told = engine.answer(engine.prepare(one), lambda text: None, lambda: False)
        assert end == told and text == told.text


def test_who_goes_away_leaves_the_canvas_to_the_others(monkeypatch):
    engine = DiffusionEngine.open(Opening("mini"))
    rows, step = [], Loop.step

    def counted(loop):
        rows.append(loop.canvas.batch)
        return step(loop)

    monkeypatch.setattr(Loop, "step", counted)
    asked = [read_request(body(messages=[{"role": "user", "content": text}])) for text in PROBLEMS]
    cancelled = [lambda: False, lambda: len(rows) >= 3, lambda: False]
    found, _ = together(engine, asked, cancelled)
    assert rows[:4] == [3, 3, 3, 2] and isinstance(found[1][1], Cancelled)
    for n in (0, 2):
        assert found[n][1] == engine.answer(engine.prepare(asked[n]), lambda text: None, lambda: False)
    # One has gone when another is over: the canvas is nobody's any more.
    alone = []
    for request in asked[:2]:
        rows.clear()
        engine.answer(engine.prepare(request), lambda text: None, lambda: False)
        alone.append(len(rows))
    first, second = sorted((0, 1), key=alone.__getitem__)
    rows.clear()
    cancelled = [lambda: False, lambda: False]
    cancelled[second] = lambda: len(rows) >= alone[first]
    found, _ = together(engine, asked[:2], cancelled)
    assert isinstance(found[second][1], Cancelled) and len(rows) == alone[first] < alone[second]
    # All have gone: it ends at once.
    rows.clear()
    found, _ = together(engine, asked, [lambda: len(rows) >= 2] * 3)
    assert all(isinstance(end, Cancelled) for _, end in found) and len(rows) == 2


@pytest.mark.parametrize("more", [{}, {"temperature": 0.8}, {"temperature": 0.8, "seed": 4}])
def test_an_error_on_a_canvas_ends_the_row_whose_it_is_and_no_other(monkeypatch, more):
    """In the middle: what the others were told is not told again, and they end as they would have."""
    engine, real, bad = DiffusionEngine.open(Opening("mini")), serving.stream, PROBLEMS[1]
    first = engine.prepare(read_request(body(messages=[{"role": "user", "content": bad}]))).ids

    def breaks(model, ids, mask, config, **told):
        has = any(row[-len(first) :] == first for row in ids.tolist())
        for n, piece in enumerate(real(model, ids, mask, config, **told)):
            if has and n == (3 if len(ids) > 1 else 1):
                raise RuntimeError("out of memory")
            yield piece

    asked = [read_request(body(messages=[{"role": "user", "content": text}]) | more) for text in PROBLEMS]
    seeds = iter(range(100)) if more and "seed" not in more else None
    if seeds is not None:
        monkeypatch.setattr(serving, "_any_seed", lambda: next(seeds))
    alone = together(engine, asked)[0]
    if seeds is not None:
        seeds = iter(range(100))
    monkeypatch.setattr(serving, "stream", breaks)
    found, order = together(engine, asked)
    assert isinstance(found[1][1], RuntimeError) and sorted(order) == [0, 1, 2]
    assert [found[n] for n in (0, 2)] == [alone[n] for n in (0, 2)]


def test_a_canvas_that_failed_is_gone_while_its_rows_are_decoded_alone(monkeypatch):
    """It may have failed for lack of the memory that it holds."""
    engine, real, held = DiffusionEngine.open(Opening("mini")), serving.stream, []

    def breaks(model, ids, mask, config, **told):
        if len(ids) > 1:
            canvas = torch.zeros(4)
            held.append(weakref.ref(canvas))
            try:
                raise KeyError("of a cause")
            except KeyError:
                raise RuntimeError(f"no memory beside {len(canvas)}") from None
        held.append(held[0]())
        yield from real(model, ids, mask, config, **told)

    monkeypatch.setattr(serving, "stream", breaks)
    asked = [read_request(body(messages=[{"role": "user", "content": text}])) for text in PROBLEMS[:2]]
    together(engine, asked)
    assert held[1:] == [None, None]


def test_a_client_that_cannot_be_told_ends_its_own_row():
    engine = DiffusionEngine.open(Opening("mini"))
    ends, said = {}, {0: "", 2: ""}

    def give(n):
        def deaf(text):
            raise ConnectionError("nobody hears")

        return deaf if n == 1 else lambda text: said.update({n: said[n] + text})

    prepared = [engine.prepare(read_request(body(messages=[{"role": "user", "content": t}]))) for t in PROBLEMS]
    asks = [Ask(one, give(n), lambda: False, lambda end, n=n: ends.update({n: end})) for n, one in enumerate(prepared)]
    waiting = [asks]
    engine.answer_rows(lambda places: waiting.pop() if waiting else [])
    assert isinstance(ends[1], ConnectionError)
    for n in (0, 2):
        told = engine.answer(prepared[n], lambda text: None, lambda: False)
        assert ends[n] == told and said[n] == told.text


class Bytes:
    """A tokenizer of letters for a vocabulary of 64."""

    chat_template = None
    bos_token_id = None

    def __call__(self, text, **options):
        return {"input_ids": [ord(c) % 58 for c in text]}

    def decode(self, ids, **options):
        return "".join(chr(65 + int(i) % 26) for i in ids)


def test_the_wings_engines_are_found_by_name():
    assert ENGINES.find("dlm.serving:DiffusionEngine") is DiffusionEngine
