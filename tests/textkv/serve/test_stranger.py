"""What a stranger may send: each request gets its own answer or one line, and the server lives for the next."""

from __future__ import annotations

import gzip
import json
import os
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest
from starlette.testclient import TestClient

from tests.textkv.serve.live import listening, mini_engine
from tests.textkv.serve.test_app import Patient, body
from textkv.serve import Limits, build_app
from textkv.serve.answers import Answer
from textkv.serve.doorkeeper import KeyFile, is_here
from textkv.serve.queue import Full

NAME = "tiny"


@pytest.fixture(scope="module")
def mini():
    return mini_engine()


@pytest.fixture
def client(mini):
    with TestClient(build_app(mini, NAME)) as client:
        mini.close = lambda: None  # the next test's app has the same engine
        yield client


def post(client, sent):
    return client.post("/v1/chat/completions", content=sent if isinstance(sent, str) else json.dumps(sent))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"messages": [{"role": "user", "content": "a\ud800b"}]}, "half a character at 1"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}]}, "half a character"),
        ({"stop": "\ud83d"}, "half a character"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "send one of them"),
    ],
)
def test_what_no_model_can_read_is_one_line(client, changed, says):
    told = post(client, body("x") | changed)
    assert told.status_code == 400 and says in told.json()["error"]["message"]
    assert "\n" not in told.json()["error"]["message"]


def test_a_packed_body_is_refused_by_what_it_is(client):
    sent = gzip.compress(json.dumps(body("x")).encode())
    told = client.post("/v1/chat/completions", content=sent, headers={"content-encoding": "gzip"})
    assert told.status_code == 415 and "content-encoding 'gzip' is not unpacked" in told.json()["error"]["message"]


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-6, 1e-3, 2])
def test_any_temperature_that_is_let_in_can_be_drawn_at(client, temperature):
    told = post(client, body("x") | {"temperature": temperature, "max_tokens": 2})
    assert told.status_code == 200, told.text


def test_a_failure_while_a_request_is_prepared_says_nothing_of_it():
    class Breaks(Patient):
        def prepare(self, request):
            raise TypeError(f"private words: {request.messages[0].content}")

    with TestClient(build_app(Breaks(), NAME)) as client:
        told = post(client, body("x"))
    assert told.status_code == 500 and "private" not in told.text
    assert told.json()["error"]["message"] == "the answer failed: TypeError"


def test_a_full_queue_is_said_before_any_work():
    engine = Patient()
    app = build_app(engine, NAME, Limits(waiting=1))
    engine.prepared = 0

    def prepare(request):
        engine.prepared += 1
        return request.messages[-1].content

    engine.prepare = prepare
    with TestClient(app) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, client, body("wait"))
        engine.begun.wait(5)
        second = pool.submit(post, client, body("next"))
        while len(app.state.turns) < 1:
            time.sleep(0.01)
        assert post(client, body("more")).status_code == 429 and engine.prepared == 2
        engine.open.set()
        assert first.result().status_code == second.result().status_code == 200
    with pytest.raises(Full):
        app.state.turns.limit = 0
        app.state.turns.check_room()


def raw(address: str, *parts: bytes, wait: float = 0.0, read: bool = True) -> bytes:
    """Sends parts over a plain socket, `wait` seconds between them; what comes back until the server closes."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as line:
        for part in parts:
            line.sendall(part)
            time.sleep(wait)
        return b"".join(iter(lambda: line.recv(65536), b"")) if read else b""


def head(length: int) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", f"Content-Length: {length}", "Connection: close"]
    return "\r\n".join([*lines, "", ""]).encode()


def test_bodies_that_do_not_come_or_are_left_are_let_go_of(caplog):
    app = build_app(Patient(), NAME, Limits(bytes=5_000, seconds=0.5))
    with listening(app) as address:
        began = time.monotonic()
        assert b" 408 " in raw(address, head(100), b"{").splitlines()[0]
        assert time.monotonic() - began < 5
        # Too large is said before it has come.
        assert b" 413 " in raw(address, head(10**9)).splitlines()[0]
        # A client that leaves in the middle.
        raw(address, head(100), b"{", read=False)
        sent = json.dumps(body("next")).encode()
        assert b" 200 " in raw(address, head(len(sent)), sent[:10], sent[10:], wait=0.05).splitlines()[0]
        told = httpx.get(f"{address}/metrics").text
    assert 'ended="client left"} 1.0' in told and 'ended="error 408"} 1.0' in told
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_stops_says_so_to_whoever_waits(stream, caplog):
    """Who is being answered, who waits in turn, and whose body has not come."""
    engine, sent = Patient(give_up=60), json.dumps(body("waiting")).encode()
    app = build_app(engine, NAME)
    with ThreadPoolExecutor(3) as pool:
        with listening(app) as address:
            there = f"{address}/v1/chat/completions"
            half = pool.submit(raw, address, head(len(sent)), sent[:10])
            asked = [pool.submit(httpx.post, there, json=body("wait", stream=stream), timeout=60)]
            assert engine.begun.wait(20)
            asked.append(pool.submit(httpx.post, there, json=body("next", stream=stream), timeout=60))
            while not len(app.state.turns):
                time.sleep(0.01)
        answered, waited = (one.result() for one in asked)
        assert b" 503 " in half.result().splitlines()[0]
    if stream:
        # What was begun ends with an error, as a stream does.
        assert answered.status_code == 200 and "the server stops" in answered.text
        assert answered.text.endswith("data: [DONE]\n\n")
    told = [waited] if stream else [answered, waited]
    assert all(one.status_code == 503 and "the server stops" in one.json()["error"]["message"] for one in told)
    assert engine.left.wait(3) and "Traceback" not in caplog.text


def test_many_clients_that_leave_leave_nothing_behind(mini):
    """Thirty at a time, at odd moments, streams and whole answers; then one is answered, and as it is alone."""
    mini.close = lambda: None
    app = build_app(mini, NAME, Limits(waiting=64))
    dice = random.Random(5)
    alone = mini.answer(mini.prepare(_asked("the end")), lambda text: None, lambda: False).text
    with listening(app) as address:

        def leave(number: int) -> None:
            sent = body(f"number {number}", stream=bool(number % 2), max_tokens=200)
            with httpx.Client(timeout=dice.uniform(0.05, 1.0)) as client, suppress(httpx.TimeoutException):
                client.post(f"{address}/v1/chat/completions", json=sent)

        with ThreadPoolExecutor(30) as pool:
            list(pool.map(leave, range(60)))
        told = httpx.post(f"{address}/v1/chat/completions", json=body("the end", max_tokens=8), timeout=120)
        assert told.status_code == 200 and told.json()["choices"][0]["message"]["content"] == alone
        assert httpx.get(f"{address}/health").json()["waiting"] == 0
    assert threading.active_count() < 60


def _asked(text):
    from textkv.serve.protocol import read_request

    return read_request(body(text, max_tokens=8))


def test_two_clients_in_one_conversation_get_the_answers_of_one():
    engine = mini_engine("full", None)
    with listening(build_app(engine, NAME)) as address:

        def talk(_: int) -> list[str]:
            messages, said = [], []
            for turn in range(3):
                messages.append({"role": "user", "content": f"question {turn}"})
                sent = {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": 6}
                told = httpx.post(f"{address}/v1/chat/completions", json=sent, timeout=120).json()
                said.append(told["choices"][0]["message"]["content"])
                messages.append({"role": "assistant", "content": said[-1]})
            return said

        with ThreadPoolExecutor(3) as pool:
            several = list(pool.map(talk, range(3)))
        assert several[0] == several[1] == several[2] == talk(0)


def test_a_conversation_that_is_edited_in_the_middle_is_answered_as_a_new_one():
    engine, fresh = mini_engine("full", None), mini_engine("full", None)

    def said(engine, *texts):
        from textkv.serve.protocol import read_request

        prepared = engine.prepare(read_request(body(*texts, max_tokens=6)))
        return engine.answer(prepared, lambda text: None, lambda: False)

    first = said(engine, "once upon a time " * 8)
    turns = ["once upon a time " * 8, first.text, "and then"]
    second = said(engine, *turns)
    for edited in (
        [*turns, second.text, "what?"],
        [turns[0], "another answer", "and then"],
        [turns[0].replace("time", "day", 1), *turns[1:]],
        [*turns[:2], "and now"],
        turns[:1],
    ):
        told = said(engine, *edited)
        assert told.text == said(fresh, *edited).text and told.prompt_tokens > told.cached_tokens
        fresh = mini_engine("full", None)


def test_stop_strings_are_found_wherever_tokens_cut_them():
    """Against the whole text: random cuts, several stop strings, characters of several bytes."""
    dice = random.Random(3)
    for _ in range(3_000):
        text = "".join(dice.choice(["a", "b", "ab", "é", "日", "\n", "🙂"]) for _ in range(dice.randint(0, 30)))
        data = text.encode()
        stops = [
            "".join(dice.choice("abé日\n🙂") for _ in range(dice.randint(1, 4))) for _ in range(dice.randint(0, 3))
        ]
        cuts = sorted({0, len(data), *(dice.randrange(len(data) + 1) for _ in range(dice.randint(0, 20)))})
        tokens = [data[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        answer = Answer(lambda ids, tokens=tokens: b"".join(tokens[i] for i in ids).decode(errors="replace"), stops)
        given = "".join(answer.add(i) for i in range(len(tokens)) if not answer.stopped) + answer.end()
        ends = [text.find(stop) for stop in stops if stop in text]
        # Of several that end in one token the earliest counts; one that ends in an earlier token has ended it already.
        ended = (
            min((len(text[: text.find(s) + len(s)].encode()), text.find(s)) for s in stops if s in text) if ends else 0
        )
        if not ends:
            assert given == text and not answer.stopped
        else:
            last = next(i for i in range(len(tokens)) if cuts[i + 1] >= ended[0])
            seen = data[: cuts[last + 1]].decode(errors="ignore")
            assert given == text[: min(seen.find(s) for s in stops if s in seen)] and answer.stopped


def test_a_key_that_is_taken_out_of_the_file_is_let_in_no_more(tmp_path, capsys):
    file = tmp_path / "keys"
    file.write_text("old\nstays\n")
    with TestClient(build_app(Patient(), NAME, keys=KeyFile(file))) as client:

        def status(key):
            return client.get("/v1/models", headers={"authorization": f"bearer {key}"}).status_code

        assert [status(key) for key in ("old", "stays", "new")] == [200, 200, 401]
        file.write_text("stays\nnew, and longer\n")
        assert [status(key) for key in ("old", "stays", "new, and longer")] == [401, 200, 200]
        # What cannot be a file of keys changes nothing: nobody is locked out, and nobody is let in.
        for broken in (
            lambda: file.write_text(" \n"),
            lambda: file.write_bytes(b"\xff\xfe\xff"),
            lambda: os.remove(file),
        ):
            broken()
            assert [status(key) for key in ("old", "stays", "")] == [401, 200, 401]
        assert capsys.readouterr().err.count("\n") == 3
        file.write_text("back\n")
        assert [status(key) for key in ("stays", "back")] == [401, 200]


@pytest.mark.parametrize(
    ("netloc", "here"),
    [("127.0.0.1:8000", True), ("localhost", True), ("[::1]:80", True), ("127.5.5.5", True), ("a.localhost:1", True),
     ("evil.example", False), ("localhost.evil.example:8000", False), ("10.0.0.1", False), ("127.0.0.1.nip.io", False),
     ("[::1", False), ("null", False), ("", False)],
)  # fmt: skip
def test_the_names_of_this_machine(netloc, here):
    assert is_here(netloc) == here


def test_a_page_of_a_strangers_cannot_use_the_server_of_whoever_reads_it():
    with TestClient(build_app(Patient(), NAME, here_alone=True), base_url="http://127.0.0.1:8000") as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models", headers={"origin": "http://localhost:3000"}).status_code == 200
        # A name that was pointed at this machine, and a page that sends what needs no leave.
        for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}, {"origin": "null"}):
            told = client.post("/v1/chat/completions", json=body("x"), headers=headers)
            assert told.status_code == 403 and "this machine alone" in told.json()["error"]["message"]
