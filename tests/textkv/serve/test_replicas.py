"""Replicas on Ray Serve: a conversation stays where its cache is, and a killed replica costs a fresh reading."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

# Not imported: it reads its settings when it is.
if importlib.util.find_spec("ray") is None or not os.environ.get("RAY_TESTS"):
    pytest.skip(
        "starts Ray, a minute's work for a small machine: install the extra ray, RAY_TESTS=1", allow_module_level=True
    )

from tests.textkv.serve.live import listening
from textkv.command.ray_cluster import connected
from textkv.serve import ChatEngine, Opening, build_app
from textkv.serve.placing import first_of, key_of
from textkv.serve.protocol import read_request
from textkv.serve.replicas import Door, replicas

OPENING = Opening("mini", method="snapkv", budget="0.5")
TOKENS = 6


@pytest.fixture(scope="module")
def address():
    with connected("local", 2), replicas(2, "local", "text", OPENING, 64) as spread:
        with listening(build_app(Door(), "mini", turns=spread)) as found:
            yield found


def body(messages, **more):
    return {"model": "mini", "messages": messages, "max_tokens": TOKENS, "temperature": 0} | more


def ask(address, messages, **more):
    told = httpx.post(f"{address}/v1/chat/completions", json=body(messages, **more), timeout=120)
    assert told.status_code == 200, told.text
    return told.json()


def said(told):
    return told["choices"][0]["message"]["content"]


def cached(told):
    return told["usage"]["prompt_tokens_details"]["cached_tokens"]


def user(text):
    return {"role": "user", "content": text}


def turns_of(address, name, turns):
    """A conversation: its messages, and per turn what was cached of the prompt."""
    messages, found = [], []
    for turn in range(turns):
        messages.append(user(f"{name} asks question {turn}"))
        told = ask(address, messages)
        messages.append({"role": "assistant", "content": said(told)})
        found.append((cached(told), told["usage"]["prompt_tokens"]))
    return messages, found


def holders():
    """Processes of replicas."""
    below = psutil.Process().children(recursive=True)
    return [one for one in below if "Replica" in " ".join(one.cmdline()) and one.status() != psutil.STATUS_ZOMBIE]


def test_keys_last_for_a_conversation_and_tell_others_apart():
    def key(*messages, **more):
        return key_of(read_request(body(list(messages), **more)))

    system, answer = {"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "Yes."}
    assert key(system, user("a")) == key(system, user("a"), answer, user("b"))
    assert len({key(user("a")), key(user("b")), key(system, user("a"))}) == 3
    assert key(user("a"), prompt_cache_key="x") == key(user("b"), prompt_cache_key="x") != key(user("a"))
    names, keys = [f"replica-{n}" for n in range(4)], [f"key-{n}" for n in range(400)]
    before = {key: first_of(key, names) for key in keys}
    assert all(60 < list(before.values()).count(name) < 140 for name in names)
    # One less: nobody moves but its own.
    after = {key: first_of(key, names[1:]) for key in keys}
    assert all(after[key] == before[key] for key in keys if before[key] != names[0])


def test_answers_are_those_of_one_engine_and_later_turns_read_only_what_is_new(address):
    engine = ChatEngine.open(OPENING)
    with ThreadPoolExecutor(4) as pool:
        talks = list(pool.map(lambda name: turns_of(address, name, 3), ["Ada", "Bo", "Cy", "Di"]))
    for messages, found in talks:
        assert found[0][0] == 0 and all(0 < reused < prompt for reused, prompt in found[1:]), (found, messages)
        for turn in range(3):
            asked = read_request(body(messages[: 2 * turn + 1]))
            alone = engine.answer(engine.prepare(asked), lambda text: None, lambda: False)
            assert alone.text == messages[2 * turn + 1]["content"] and alone.cached_tokens == found[turn][0]


def test_a_killed_replica_is_answered_for_by_another(address):
    messages, found = turns_of(address, "Eve", 2)
    assert found[1][0] > 0
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, address, [user("Hal")], max_tokens=600)
        time.sleep(1)
        killed = holders()
        assert len(killed) == 2 and not asked.done()
        for one in killed:
            one.send_signal(signal.SIGKILL)
        # What was being answered is answered, and is what it would have been.
        told = asked.result()
    engine = ChatEngine.open(OPENING)
    whole = engine.prepare(read_request(body([user("Hal")], max_tokens=600)))
    assert said(told) == engine.answer(whole, lambda text: None, lambda: False).text
    # The other conversation died with its replica: it is read afresh, and kept from then on.
    told = ask(address, [*messages, user("And after that?")])
    assert cached(told) == 0 and told["usage"]["completion_tokens"] == TOKENS
    again = ask(address, [*messages, user("And after that?"), {"role": "assistant", "content": said(told)}, user("?")])
    assert cached(again) > 0


def test_a_stream_comes_in_pieces_and_a_wrong_request_is_told(address):
    whole = said(ask(address, [user("Flora")]))
    streamed = httpx.post(f"{address}/v1/chat/completions", json=body([user("Flora")], stream=True), timeout=120)
    assert streamed.text.endswith("data: [DONE]\n\n") and streamed.text.count('"content"') > 1 and whole
    told = httpx.post(f"{address}/v1/chat/completions", json=body([user("x " * 20_000)]), timeout=120)
    assert told.status_code == 400 and "the model reads up to" in told.json()["error"]["message"]


def test_a_client_that_leaves_frees_its_replica(address):
    with httpx.Client() as client, pytest.raises(httpx.ReadTimeout):
        client.post(f"{address}/v1/chat/completions", json=body([user("Gus")], max_tokens=1500), timeout=1)
    began = time.monotonic()
    ask(address, [user("Gus")])
    assert time.monotonic() - began < 30


def test_what_cannot_be_opened_is_one_line(address):
    with pytest.raises(ValueError, match="processors"), replicas(3, "local", "text", OPENING, 1):
        pass
    assert os.environ["RAY_AUTH_MODE"] == "token"
