"""The server as clients meet it: the openai package and plain HTTP, on a tiny model that talks in letters."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import torch
from openai import APIStatusError, OpenAI
from starlette.testclient import TestClient

from tests.textkv import tiny
from tests.textkv.serve.live import listening
from textkv import MethodCache
from textkv.serve import Cancelled, ChatEngine, Engine, Limits, Outcome, build_app

NAME = "tiny"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and loop.first %}"
    "{{ raise_exception('the assistant cannot begin') }}{% endif %}<{{ m['content'] }}>{% endfor %}"
)


class Letters:
    """A tokenizer of which each character is a token, of the tiny model's vocabulary."""

    chat_template = TEMPLATE

    def apply_chat_template(self, messages, chat_template, **options):
        from transformers.utils.chat_template_utils import render_jinja_template

        return render_jinja_template([messages], chat_template=chat_template)[0][0]

    def __call__(self, text, **options):
        return {"input_ids": torch.tensor([[ord(c) % 90 + 5 for c in text]])}

    def decode(self, ids, **options):
        return "".join(chr(97 + i % 26) for i in ids)


@pytest.fixture(scope="module")
def model():
    return tiny.build("llama")


def engine_of(model, method="full", budget=None, **options):
    return ChatEngine(model, Letters(), method, budget, answer_tokens=6, **options)


@contextmanager
def served(engine, limits=None, keys=()):
    with TestClient(build_app(engine, NAME, limits, keys)) as client:
        yield client


def body(*texts, **changed):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"model": NAME, "messages": messages, "temperature": 0} | changed


def ask(client, *texts, **changed):
    answer = client.post("/v1/chat/completions", json=body(*texts, **changed))
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_answer_is_that_of_the_library(model):
    ids = Letters()("<hello>")["input_ids"]
    alone = model.generate(ids, past_key_values=MethodCache(model, "snapkv", 0.5), do_sample=False, max_new_tokens=6)
    with served(engine_of(model, "snapkv", 0.5)) as client:
        told = ask(client, "hello")
    assert told["choices"][0]["message"]["content"] == Letters().decode(alone[0, ids.shape[1] :].tolist())
    assert told["usage"]["prompt_tokens"] == ids.shape[1] and told["usage"]["completion_tokens"] == 6
    assert told["choices"][0]["finish_reason"] == "length"


def test_a_limit_of_the_request_goes_before_the_servers(model):
    with served(engine_of(model)) as client:
        assert ask(client, "hello", max_tokens=3)["usage"]["completion_tokens"] == 3
        assert ask(client, "hello", max_completion_tokens=9)["usage"]["completion_tokens"] == 9


def test_a_stream_is_the_whole_answer_in_pieces(model):
    with served(engine_of(model)) as client:
        whole = ask(client, "hello")["choices"][0]["message"]["content"]
        asked = body("hello", stream=True, stream_options={"include_usage": True})
        lines = client.post("/v1/chat/completions", json=asked).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    texts = [e["choices"][0]["delta"].get("content", "") for e in events if e["choices"]]
    assert "".join(texts) == whole and len([t for t in texts if t]) == 6
    assert events[-1]["usage"]["completion_tokens"] == 6 and events[-2]["choices"][0]["finish_reason"] == "length"


def test_a_stop_string_is_no_part_of_the_answer(model):
    with served(engine_of(model)) as client:
        whole = ask(client, "hello")["choices"][0]["message"]["content"]
        told = ask(client, "hello", stop=whole[2:4])["choices"][0]
    assert told["message"]["content"] == whole[: whole.index(whole[2:4])] and told["finish_reason"] == "stop"


def test_equal_seeds_draw_equal_answers(model):
    with served(engine_of(model)) as client:
        drawn = [ask(client, "hello", temperature=1.5, seed=s)["choices"][0]["message"]["content"] for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_penalty_keeps_a_token_from_coming_again(model):
    with served(engine_of(model)) as client:
        once = ask(client, "hello", presence_penalty=2, frequency_penalty=2, max_tokens=20)
        plain = ask(client, "hello", max_tokens=20)
    variety = [len(set(x["choices"][0]["message"]["content"])) for x in (once, plain)]
    assert variety[0] > variety[1]


def test_the_openai_client_talks_in_turns_and_only_what_is_new_is_read(model):
    with listening(build_app(engine_of(model, "snapkv", 0.5), NAME)) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        assert [m.id for m in client.models.list()] == [NAME] and client.models.retrieve(NAME).id == NAME
        first = client.chat.completions.create(**body("hello"))
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        # The tokenizer of this test does not read its own answers back; the prompt is what both share.
        pieces = list(client.chat.completions.create(**body("hello"), stream=True))
        assert "".join(p.choices[0].delta.content or "" for p in pieces) == first.choices[0].message.content
        # As its manual has it: the message that came is appended, with all its fields.
        for said in (first.choices[0].message, first.choices[0].message.model_dump()):
            turns = [*body("hello")["messages"], said, {"role": "user", "content": "go on"}]
            assert client.chat.completions.create(**body("x") | {"messages": turns}).usage.completion_tokens
        with pytest.raises(APIStatusError, match="n: Input should be less than or equal to 1"):
            client.chat.completions.create(**body("hello"), n=2)


@pytest.mark.parametrize(
    ("sent", "status", "says"),
    [
        (b"", 400, "body"),
        (b"{", 400, "body"),
        (b"\xff\xfe", 400, "body"),
        (b"[" * 4_900, 400, "body"),
        (b"[]", 400, "body"),
        (json.dumps(body("x") | {"model": "other"}).encode(), 404, "no model 'other'"),
        (json.dumps(body("x", n=3)).encode(), 400, "n: "),
        (json.dumps(body("x" * 4_500)).encode(), 400, "the model reads up to"),
        (json.dumps({"model": NAME, "messages": [{"role": "assistant", "content": "x"}]}).encode(), 400, "begin"),
        (b" " * 6_000, 413, "larger than 5,000 bytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_one_line(model, sent, status, says):
    with served(engine_of(model), Limits(bytes=5_000)) as client:
        told = client.post("/v1/chat/completions", content=sent)
    assert told.status_code == status
    error = told.json()["error"]
    assert says in error["message"] and "\n" not in error["message"] and error["type"]


def test_an_error_has_the_code_that_clients_look_for(model):
    with served(engine_of(model), keys=("secret",)) as client:
        unknown = client.post("/v1/chat/completions", json=body("x"))
        client.headers["authorization"] = "Bearer secret"
        long = client.post("/v1/chat/completions", json=body("x" * 4_500))
        other = client.post("/v1/chat/completions", json=body("x", model="other"))
        wrong = client.post("/v1/chat/completions", json=body("x", temperature=9))
    told = [
        (x.status_code, x.json()["error"]["code"], x.json()["error"]["param"]) for x in (unknown, long, other, wrong)
    ]
    assert told == [
        (401, "invalid_api_key", None),
        (400, "context_length_exceeded", "messages"),
        (404, "model_not_found", "model"),
        (400, None, "temperature"),
    ]


def test_a_picture_for_a_text_model_is_refused(model):
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with served(engine_of(model)) as client:
        told = client.post("/v1/chat/completions", json=body() | {"messages": [{"role": "user", "content": [part]}]})
    assert told.status_code == 400 and "text only" in told.json()["error"]["message"]


def test_a_key_is_asked_for_everywhere_but_at_health(model):
    with served(engine_of(model), keys=("secret", "other")) as client:
        assert client.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/nowhere"):
            assert client.get(path).status_code == 401
        assert client.get("/v1/models", headers={"authorization": "Bearer other"}).status_code == 200
        for wrong in ("Bearer secre", "Bearer ", "secret2", "Bearer sécret"):
            assert client.get("/v1/models", headers={"authorization": wrong.encode()}).status_code == 401


def test_metrics_count_and_hold_no_text(model):
    with served(engine_of(model)) as client:
        ask(client, "private words")
        client.post("/v1/chat/completions", json=body("x", n=3))
        told = client.get("/metrics").text
    assert 'agentkv_requests_total{ended="answered"} 1.0' in told
    assert 'agentkv_requests_total{ended="error 400"} 1.0' in told
    assert 'agentkv_tokens_total{done="written"} 6.0' in told
    assert "agentkv_kv_bytes " in told and "private" not in told


class Patient(Engine):
    """Answers until nobody listens any more; notes the order of what it was asked."""

    def __init__(self, give_up=5.0):
        self.order, self.left, self.give_up = [], threading.Event(), give_up
        self.begun, self.open = threading.Event(), threading.Event()

    def prepare(self, request):
        return request.messages[-1].content

    def answer(self, prepared, give, cancelled):
        self.begun.set()
        self.order.append(prepared)
        if prepared == "broken":
            raise RuntimeError("private words of the prompt")
        end = time.monotonic() + self.give_up
        while prepared == "wait" and not self.open.is_set() and time.monotonic() < end:
            if cancelled():
                self.left.set()
                raise Cancelled
            give("x")
            time.sleep(0.01)
        return Outcome("done", "stop", 1, 0, 1)

    def figures(self):
        return {}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_model(stream):
    engine = Patient()
    with listening(build_app(engine, NAME)) as address:
        with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.5) as client:
            with client.stream("POST", f"{address}/v1/chat/completions", json=body("wait", stream=stream)) as answer:
                # A stream is left in the middle, a plain request while it waits.
                next(answer.iter_lines())
                raise httpx.ReadTimeout("left")
        assert engine.left.wait(3)
        assert httpx.post(f"{address}/v1/chat/completions", json=body("next")).status_code == 200


def test_an_error_within_the_model_is_told_without_its_words_and_the_next_is_answered():
    with served(Patient()) as client:
        told = client.post("/v1/chat/completions", json=body("broken"))
        assert told.status_code == 500 and "private" not in told.text and "RuntimeError" in told.text
        assert ask(client, "next")["choices"][0]["message"]["content"] == "done"


def test_an_answer_that_takes_too_long_is_given_up():
    engine = Patient()
    with served(engine, Limits(seconds=0.3)) as client:
        told = client.post("/v1/chat/completions", json=body("wait"))
        assert told.status_code == 504 and engine.left.wait(3)


def test_clients_take_turns_and_a_full_queue_is_said():
    engine = Patient()
    app = build_app(engine, NAME, Limits(waiting=3), keys=("a", "b"))

    async def talk():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:

            def send(key, text):
                headers = {"authorization": f"Bearer {key}"}
                return asyncio.create_task(client.post("/v1/chat/completions", json=body(text), headers=headers))

            first = send("a", "wait")
            await asyncio.to_thread(engine.begun.wait, 5)
            rest = []
            for key, text in (("a", "a1"), ("a", "a2"), ("b", "b1")):
                rest.append(send(key, text))
                while len(app.state.turns) < len(rest):
                    await asyncio.sleep(0.01)
            full = await send("b", "b2")
            engine.open.set()
            return full, [await task for task in (first, *rest)]

    full, answers = asyncio.run(talk())
    assert full.status_code == 429 and full.json()["error"]["type"] == "rate_limit_error"
    assert [a.status_code for a in answers] == [200] * 4
    # b came last, and need not wait for all of a's
    assert engine.order == ["wait", "a1", "b1", "a2"]
    app.state.turns.close()


@pytest.mark.parametrize("wrong", [{"bytes": 0}, {"waiting": -1}, {"seconds": 0.0}])
def test_a_limit_that_lets_nothing_through_is_refused(wrong):
    with pytest.raises(ValueError, match="more than 0"):
        Limits(**wrong)


def test_a_model_without_a_chat_template_is_refused(model):
    tokenizer = Letters()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ChatEngine(model, tokenizer)
