"""Answers that keep a JSON schema, from a model that would say anything else."""

from __future__ import annotations

import json
import sys
from typing import Literal

import pytest
from openai import OpenAI
from pydantic import BaseModel, Field
from starlette.testclient import TestClient

from tests.textkv.serve.live import listening, mini_engine
from textkv.serve import build_app
from textkv.serve.protocol import Wrong
from textkv.serve.structured import check_schema

NAME = "mini"
RULES = "Answer in few words. " * 20  # long enough to be worth keeping


@pytest.fixture(scope="module")
def engine():
    pytest.importorskip("xgrammar", reason="extra structured is not installed")
    return mini_engine()


@pytest.fixture(scope="module")
def client(engine):
    with TestClient(build_app(engine, NAME)) as client:
        yield client


def ask(client, text="Name one.", **changed):
    body = {"model": NAME, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 60}
    return client.post("/v1/chat/completions", json=body | changed)


def form(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True} | more}


class Colour(BaseModel):
    name: Literal["red", "green"]
    share: int = Field(ge=0, le=9)


def schema_of(model):
    return model.model_json_schema() | {"additionalProperties": False}


@pytest.mark.parametrize("sampled", [{"temperature": 0}, {"temperature": 1.5, "seed": 3}])
def test_an_answer_keeps_the_schema(client, sampled):
    told = ask(client, response_format=form(schema_of(Colour)), **sampled).json()["choices"][0]
    assert told["finish_reason"] == "stop"
    assert Colour.model_validate_json(told["message"]["content"]).name in ("red", "green")


def test_a_stream_keeps_it_too_and_the_next_answer_is_free(client):
    chunks = ask(client, response_format=form(schema_of(Colour)), stream=True).text.split("data: ")[1:-1]
    text = "".join(json.loads(x)["choices"][0]["delta"].get("content", "") for x in chunks)
    assert Colour.model_validate_json(text)
    free = ask(client).json()["choices"][0]["message"]["content"]
    assert free == ask(client, response_format={"type": "text"}).json()["choices"][0]["message"]["content"]
    assert not free.startswith("{")


def test_a_json_object_is_one(client):
    told = ask(client, response_format={"type": "json_object"}, max_tokens=8).json()["choices"][0]
    assert told["message"]["content"].startswith("{") and told["finish_reason"] in ("stop", "length")


def test_a_conversation_goes_on_behind_a_constrained_answer(client):
    first = ask(client, RULES, response_format=form(schema_of(Colour))).json()
    said = first["choices"][0]["message"]["content"]
    messages = [
        {"role": "user", "content": RULES}, {"role": "assistant", "content": said},
        {"role": "user", "content": "Another."},
    ]  # fmt: skip
    second = ask(client, messages=messages, response_format=form(schema_of(Colour))).json()
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 64
    assert Colour.model_validate_json(second["choices"][0]["message"]["content"])


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "nonsense"}, "nonsense"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"type": "string", "pattern": "(("}, "parenthesis"),
        ({"enum": ["x" * 200_000]}, "at most"),
    ],
)
def test_a_schema_that_cannot_be_carried_out_is_one_line(client, schema, says):
    told = ask(client, response_format=form(schema))
    assert told.status_code == 400
    line = told.json()["error"]["message"]
    assert says in line and "\n" not in line and ".cc" not in line


def test_without_the_extra_it_is_said_what_is_missing(monkeypatch):
    engine = mini_engine()
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with TestClient(build_app(engine, NAME)) as client:
        told = ask(client, response_format={"type": "json_object"})
        assert told.status_code == 400 and "agentkv[structured]" in told.json()["error"]["message"]
        assert ask(client).status_code == 200


def test_the_openai_client_parses_into_its_own_types(engine):
    with listening(build_app(engine, NAME)) as address:
        talker = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        told = talker.chat.completions.parse(
            model=NAME, messages=[{"role": "user", "content": "A colour?"}], response_format=Colour, temperature=0
        )
        assert isinstance(told.choices[0].message.parsed, Colour)


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "integer", "not": {"const": 5}}, "not is not carried out"),
        (OBJECT | {"if": {"required": ["a"]}, "then": {"required": ["b"]}}, "if is not carried out"),
        (
            {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
            "uniqueItems of properties.a",
        ),
        ({"$ref": "http://example.org/x"}, "leads out of the schema"),
        ({"$ref": "#/$defs/a", "minimum": 5, "$defs": {"a": {"type": "integer"}}}, "minimum beside \\$ref"),
        (OBJECT | {"anyOf": [{"required": ["a"]}]}, "properties beside anyOf"),
        ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, "allOf of several"),
        ({"type": "string", "pattern": "^a$|^b$"}, "pattern looks"),
        ({"type": "object", "patternProperties": {"a$b": {}}}, "pattern looks"),
        ({"type": "array", "items": {"anyOf": [{"not": {}}]}}, "not of items.anyOf"),
        ({"type": "string", "pattern": "[a]^b"}, "pattern looks"),
        ({"type": "string", "pattern": r"a$\d"}, "pattern looks"),
        ({"type": "string", "pattern": "^(?=a)b$"}, "pattern looks"),
        ({"type": "string", "pattern": "^[a-z]+$", "maxLength": 1}, "maxLength beside pattern"),
        ({"type": "string", "format": "date", "minLength": 1}, "minLength beside format"),
        ({"type": "array", "contains": {"type": "integer"}}, "contains is not carried out"),
        (OBJECT | {"dependencies": {"a": ["b"]}}, "dependencies is not carried out"),
        ({"const": "a", "enum": ["a", "b"]}, "const beside enum"),
        ({"type": "integer", "enum": [1, "b"]}, "is not of type integer"),
        ({"type": "integer", "const": True}, "is not of type integer"),
    ],
)
def test_what_would_be_passed_over_is_refused(schema, says):
    with pytest.raises(Wrong, match=says) as caught:
        check_schema(schema)
    assert caught.value.param == "response_format"


def test_names_defaults_and_descriptions_are_no_keywords():
    class Part(BaseModel):
        """Of another."""

        kind: Literal["not"] | None = None

    class Whole(BaseModel):
        part: Part = Field(Part(), description="if there is one", examples=[{"not": 1}])
        other: Part | Colour

    check_schema(schema_of(Whole))
    check_schema({"type": "object", "properties": {"not": {"type": "string"}, "uniqueItems": {"const": {"if": 1}}}})
    check_schema({"type": "array", "items": {"type": "integer"}, "uniqueItems": False})
    check_schema({"type": ["string", "null"], "enum": ["a", None]})
    check_schema({"type": "number", "const": 1})
    for pattern in (r"^(a|b)$", "^(?:a|b)$", r"[^$]+", r"\$5", r"^[\]^]\^$", r"a\\$", ""):
        check_schema({"type": "string", "pattern": pattern})
    # What is wrong otherwise is the library's to say.
    check_schema({"type": "object", "properties": [1, None]})
    check_schema({"anyOf": 5})
