"""Requests that are carried out, and one line for those that are not."""

import base64

import pytest

from textkv.serve.protocol import ChatRequest, Wrong, read_request

HELLO = [{"role": "user", "content": "hello"}]


def body(**changed):
    return {"model": "m", "messages": HELLO} | changed


def picture(url):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0: no tools are called here"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "no tools are called"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}, "no tools are called"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "url": "x"}]}]}, "content"),
        ({"n": 2}, "n:"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools: no tools are called here"),
        ({"max_tokens": True}, "max_tokens: .*valid integer"),
        ({"max_tokens": "5"}, "max_tokens: .*valid integer"),
        ({"temperature": "0.5"}, "temperature: .*valid number"),
        ({"temperature": False}, "temperature: .*valid number"),
        ({"seed": "1"}, "seed: .*valid integer"),
        ({"stream": 1}, "stream: .*valid boolean"),
        ({"stream": "yes"}, "stream: .*valid boolean"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "send one of them"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "json_schema belongs"),
        ({"response_format": {"type": "text", "json_schema": {"name": "x"}}}, "json_schema belongs"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"max_tokens": 0}, "max_"),
        ({"max_completion_tokens": -5}, "max_"),
        ({"max_tokens": 1.5}, "max_"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"temperatur": 0}, "temperatur is no field"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_by_name(changed, named):
    with pytest.raises(ValueError, match=named) as caught:
        read_request(body(**changed))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("wrong", [None, [], "x", 5, {}, {"model": "m"}, {"messages": HELLO}])
def test_a_body_that_is_no_request_is_one_line(wrong):
    with pytest.raises(ValueError, match="^[^\n]+$"):
        read_request(wrong)


def test_labels_and_the_forms_that_change_nothing_are_accepted():
    request = read_request(
        body(n=1, logprobs=False, tools=[], tool_choice="none", response_format={"type": "text"}, user="u",
             metadata={"a": "b"}, prompt_cache_key="k", store=False, service_tier="auto", parallel_tool_calls=True)
    )  # fmt: skip
    assert request.max_tokens is None and request.stop == [] and not request.tells_usage


def test_null_is_a_field_left_out():
    optional = set(ChatRequest.model_fields) - {"model", "messages"}
    names = [*optional, "max_completion_tokens", "functions", "a field of tomorrow"]
    assert read_request(body(**dict.fromkeys(names))) == read_request(body())
    assert read_request(body(max_tokens=5, max_completion_tokens=None)).max_tokens == 5
    assert read_request(body(max_tokens=None, max_completion_tokens=5)).max_tokens == 5
    assert read_request(body(max_tokens=5.0, temperature=1)).max_tokens == 5


def test_an_answer_comes_back_with_all_that_was_in_it():
    empty = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    for extra in (empty, empty | {"tool_calls": [], "annotations": None}):
        said = {"role": "assistant", "content": "x"} | extra
        assert read_request(body(messages=[*HELLO, said])).messages[1].content == "x"


def test_both_names_of_the_length_and_both_forms_of_stop():
    assert read_request(body(max_tokens=5)).max_tokens == 5
    assert read_request(body(max_completion_tokens=6)).max_tokens == 6
    assert read_request(body(stop="x")).stop == ["x"]
    assert read_request(body(stop=None)).stop == []


@pytest.mark.parametrize(
    "url",
    ["http://example.org/x.png", "https://example.org/x.png", "file:///etc/passwd", "/etc/passwd", "x.png", "",
     "data:text/html;base64,AAAA", "data:image/png,raw", "data:image/png;base64,a", "data:image/png;base64,é"],
)  # fmt: skip
def test_only_pictures_inside_the_request_are_read(url):
    request = read_request(body(messages=picture(url)))
    with pytest.raises(Wrong, match="picture") as caught:
        list(request.messages[0].parts())
    assert caught.value.param == "messages"


def test_texts_and_pictures_keep_their_order():
    data = base64.b64encode(b"file").decode()
    content = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": f"data:image/png;base64,{data}"},
        {"type": "text", "text": "b"},
    ]
    message = read_request(body(messages=[{"role": "user", "content": content}])).messages[0]
    assert list(message.parts()) == ["a", b"file", "b"]


@pytest.mark.parametrize(
    "head", ["data:image/png;base64", "DATA:image/PNG;base64", "data:image/png;charset=utf-8;base64"]
)
def test_a_picture_in_lines_and_by_other_letters_is_whole(head):
    data = base64.encodebytes(bytes(range(200))).decode()
    assert "\n" in data.strip()
    request = read_request(body(messages=picture(f"{head},{data}")))
    assert list(request.messages[0].parts()) == [bytes(range(200))]


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"temperature": 5}, "temperature"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages.0.role"),
        ({"top_k": 5}, "top_k"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, None),
    ],
)
def test_an_error_names_its_field_as_clients_look_for_it(changed, param):
    with pytest.raises(Wrong) as caught:
        read_request(body(**changed))
    assert caught.value.param == param
