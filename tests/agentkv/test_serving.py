"""Vision-language models behind the server: pictures in turns, caches that go on, what is refused."""

from __future__ import annotations

import base64
import json
import struct
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from agentkv import serving
from agentkv.serving import PIXELS, VisionEngine
from textkv import Conversation
from textkv.serve import Opening, build_app


def url_of(image: Image.Image, form: str = "PNG") -> str:
    file = BytesIO()
    image.save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def picture_of(turn) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(turn["content"][0]["image_url"]["url"].partition(",")[2])))


def noise(seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 255, (210, 160, 3), dtype=np.uint8)
    return url_of(Image.fromarray(pixels))


def shown(url: str, text: str = "Click on the button."):
    picture = {"type": "image_url", "image_url": {"url": url}}
    return {"role": "user", "content": [picture, {"type": "text", "text": text}]}


@contextmanager
def served(**options):
    engine = VisionEngine.open(Opening("mini", **options))
    with TestClient(build_app(engine, "mini")) as client:
        yield client


def ask(client, messages):
    answer = client.post("/v1/chat/completions", json={"model": "mini", "temperature": 0, "messages": messages})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"], answer.json()["usage"]


def talk(client, pictures=3):
    """Turns with a picture each: answers, and tokens of the prompt that were not read again."""
    messages, answers, cached = [{"role": "system", "content": "You are a GUI agent."}], [], []
    for seed in range(pictures):
        messages.append(shown(noise(seed)))
        text, usage = ask(client, messages)
        messages.append({"role": "assistant", "content": text})
        answers.append(text)
        cached.append((usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]))
    return answers, cached


def test_turns_with_pictures_read_only_what_is_new():
    with served(method="gui-kv", budget="0.4") as client:
        answers, cached = talk(client)
        told = client.get("/metrics").text
    assert all("Action" in answer for answer in answers)
    assert cached[0][0] == 0
    for (_, before), (reused, _) in zip(cached, cached[1:], strict=False):
        assert reused >= before
    assert "agentkv_conversations_continued_total 2.0" in told


def test_a_conversation_on_disk_answers_as_one_in_memory(tmp_path):
    with served(method="gui-kv", budget="0.4") as client:
        expected = talk(client)
    with served(method="gui-kv", budget="0.4", memory=1, disk=tmp_path) as client:
        assert talk(client) == expected
        assert "agentkv_conversations_from_disk_total 2.0" in client.get("/metrics").text
    assert not list(tmp_path.iterdir())


def test_the_full_cache_answers_as_a_fresh_one():
    with served(method="full") as client:
        answers, _ = talk(client)
    with served(method="full", memory=1) as client:
        assert talk(client)[0] == answers


def test_another_picture_under_the_same_words_is_seen():
    with served(method="full") as client:
        first = [shown(noise(0)), {"role": "assistant", "content": "x"}, shown(noise(1))]
        other = [shown(noise(5)), {"role": "assistant", "content": "x"}, shown(noise(1))]
        ask(client, first)
        _, usage = ask(client, other)
    assert usage["prompt_tokens_details"]["cached_tokens"] < 64


@pytest.mark.parametrize("method", ["full", "gui-kv"])
def test_another_conversation_that_begins_alike_takes_nothing_away(method):
    """Two agents in turn, of one system prompt: neither is taken for the other with its pictures left out."""
    words = "You are a GUI agent. Look at the screenshot, then say in one line what to do next, and nothing else."
    system = {"role": "system", "content": words}
    budget = None if method == "full" else "0.4"
    with (
        served(method=method, budget=budget) as together,
        served(method=method, budget=budget) as one,
    ):
        talks = [
            [system, shown(noise(seed), text)] for seed, text in ((0, "Click on the button."), (1, "Type a word."))
        ]
        told = []
        for turn in range(3):
            for number, messages in enumerate(talks):
                answer, usage = ask(together, messages)
                told.append((usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], answer))
                messages += [{"role": "assistant", "content": answer}, shown(noise(2 + 2 * turn + number))]
        for (before, *_), (_, cached, _) in zip(told, told[2:], strict=False):
            assert cached >= before
        # The first of these is alone on a server of its own.
        messages = [system, shown(noise(0), "Click on the button.")]
        for turn in range(3):
            answer, _ = ask(one, messages)
            assert answer == told[2 * turn][2]
            messages += [{"role": "assistant", "content": answer}, shown(noise(2 + 2 * turn))]


def test_a_page_cannot_open_a_turn_by_its_words():
    engine = VisionEngine.open(Opening("mini", "cpu"))
    marker = engine.adapter.markers[0]
    with TestClient(build_app(engine, "mini")) as client:
        _, plain = ask(client, [shown(noise(0), "a b")])
        _, marked = ask(client, [shown(noise(0), f"a {marker} b")])
    assert marked["prompt_tokens"] > plain["prompt_tokens"] + 1


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("data:image/png;base64,AAAA", "cannot be read: 3 bytes that are none of PNG, JPEG, WEBP, GIF, BMP"),
        ("data:image/svg+xml;base64,AAAA", "cannot be read"),
        (url_of(Image.new("1", (PIXELS // 5_000 + 1, 5_000))), "larger than"),
        ("/etc/hostname", "data:image"),
    ],
    ids=["no picture", "svg", "huge", "a path"],
)
def test_a_picture_that_cannot_be_taken_is_one_line(url, says):
    with served() as client:
        answer = client.post("/v1/chat/completions", json={"model": "mini", "messages": [shown(url)]})
    assert answer.status_code == 400 and says in answer.json()["error"]["message"]


def test_many_large_pictures_are_refused_before_one_is_decoded(monkeypatch):
    monkeypatch.setattr(serving, "_whole", lambda image: pytest.fail("it was decoded"))
    large = url_of(Image.new("1", (5_000, PIXELS // 5_000)))
    picture = {"type": "image_url", "image_url": {"url": large}}
    with served() as client:
        body = {"model": "mini", "messages": [{"role": "user", "content": [picture] * 6}]}
        answer = client.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and "6 pictures of 240,000,000 pixels" in error["message"]
    assert error["param"] == "messages"


def test_a_photo_is_seen_as_it_stands():
    """Turned by what its file says, as by transformers' own loader of pictures."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (210, 160, 3), dtype=np.uint8))
    lies, turned = BytesIO(), BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    image.save(lies, "PNG", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(turned, "PNG")
    lying, upright = (serving._whole(serving._opened(file.getvalue())) for file in (lies, turned))
    assert lying.tobytes() == upright.tobytes()


@pytest.mark.parametrize("error", [struct.error("required argument is not an integer"), TypeError("bad operand")])
def test_whatever_a_decoder_says_of_damaged_bytes_is_one_line(monkeypatch, error):
    def broken(image):
        raise error

    monkeypatch.setattr(serving.ImageOps, "exif_transpose", broken)
    with served() as client:
        body = {"model": "mini", "messages": [shown(noise(0))]}
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and "a picture cannot be read: " in answer.json()["error"]["message"]


def test_jpeg_and_texts_without_pictures_are_taken():
    with served() as client:
        _, picture = ask(client, [shown(url_of(Image.new("RGB", (160, 210), "white"), "JPEG"))])
        text, words = ask(client, [{"role": "user", "content": "hello"}])
    assert picture["prompt_tokens"] > 100 > words["prompt_tokens"] > 0 and isinstance(text, str)


def test_an_answer_to_a_picture_keeps_a_schema():
    pytest.importorskip("xgrammar", reason="extra structured is not installed")
    schema = {
        "type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
        "required": ["x", "y"], "additionalProperties": False,
    }  # fmt: skip
    asked = {"type": "json_schema", "json_schema": {"name": "point", "schema": schema}}
    with served(method="gui-kv", budget="0.4") as client:
        sent = {"model": "mini", "temperature": 0, "messages": [shown(noise(0))], "response_format": asked}
        told = client.post("/v1/chat/completions", json=sent).json()["choices"][0]
    text = told["message"]["content"]
    if told["finish_reason"] == "stop":
        assert set(json.loads(text)) == {"x", "y"}
    else:  # a number may go on and on: cut, and still the beginning of an object
        assert text.lstrip().startswith("{")


def sliding(engine, keep=2, pictures=5):
    """Turns of which the client sends the last `keep` pictures only: answers, and (cached, prompt) tokens."""
    users, answers, told = [], [], []
    with TestClient(build_app(engine, "mini")) as client:
        for seed in range(pictures):
            users.append(shown(noise(seed)))
            messages = [{"role": "system", "content": "You are a GUI agent."}]
            for turn, user in enumerate(users):
                seen = turn >= len(users) - keep
                messages.append(user if seen else user | {"content": user["content"][1:]})
                messages += [{"role": "assistant", "content": text} for text in answers[turn : turn + 1]]
            text, usage = ask(client, messages)
            answers.append(text)
            told.append((text, usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]))
        figures = engine.figures() | {"gone": sum(int(held.forgotten.sum()) for held in engine.shelf._kept)}
    return told, figures


@pytest.mark.parametrize("memory", [None, 1])
def test_pictures_that_a_client_leaves_out_are_forgotten_and_nothing_is_read_again(memory, tmp_path):
    engine = VisionEngine.open(Opening("mini", method="gui-kv", budget="0.4", memory=memory, disk=tmp_path))
    told, figures = sliding(engine)
    # Only the newest turn is read, also when older pictures have gone, and from disk as from memory.
    assert all(cached > prompt / 2 for _, cached, prompt in told[2:]), told
    assert figures["conversations_new_total"] == 1
    # Three pictures, and the markers around them.
    assert figures["gone"] == (0 if memory else 3 * (12 * 16 + 2))


def test_where_positions_end_a_history_is_read_again(monkeypatch):
    monkeypatch.setattr(VisionEngine, "_limit", 760)
    engine = VisionEngine.open(Opening("mini", method="gui-kv", budget="0.4"))
    engine.answer_tokens = 20
    told, figures = sliding(engine)
    # Two pictures always fit; the third that is forgotten leaves no room behind it.
    assert len(told) == 5 and figures["conversations_dropped_total"] >= 1
    assert [cached for _, cached, _ in told].count(0) >= 2


def test_forgetting_is_what_the_library_does():
    engine = VisionEngine.open(Opening("mini", method="full"))
    told, _ = sliding(engine, keep=1, pictures=3)
    users, adapter = [shown(noise(seed)) for seed in range(3)], engine.adapter
    talk, messages = Conversation(adapter.model, "full"), [{"role": "system", "content": "You are a GUI agent."}]
    for turn, user in enumerate(users):
        images = [picture_of(user) for user in users[: turn + 1]]
        messages.append(
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Click on the button."}]}
        )
        prompt = adapter.chat(messages, images)
        if turn:
            talk.cache.forget([prompt.spans[turn - 1 : turn]])
        out = talk.generate(**prompt.inputs, max_new_tokens=adapter.answer_tokens, do_sample=False)
        text = adapter.words_of(out[0, prompt.inputs["input_ids"].shape[1] :].tolist())
        assert text == told[turn][0]
        messages.append({"role": "assistant", "content": text})


def test_a_picture_that_comes_back_is_read_again():
    engine = VisionEngine.open(Opening("mini", method="gui-kv", budget="0.4"))
    first = [{"role": "system", "content": "You are a GUI agent."}, shown(noise(0))]
    with TestClient(build_app(engine, "mini")) as client:
        text, _ = ask(client, first)
        later = [*first, {"role": "assistant", "content": text}, shown(noise(1))]
        shorter = [first[0], first[1] | {"content": first[1]["content"][1:]}, *later[2:]]
        again, usage = ask(client, shorter)
        assert usage["prompt_tokens_details"]["cached_tokens"] > 0
        _, usage = ask(client, [*later, {"role": "assistant", "content": again}, shown(noise(2))])
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0
