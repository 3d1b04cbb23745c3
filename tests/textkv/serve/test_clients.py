"""Clients that people have: LangChain's, and the harness of EleutherAI, against a server that listens."""

from __future__ import annotations

import json
from typing import Literal

import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from pydantic import BaseModel

from tests.textkv.serve.live import listening, mini_engine
from textkv.serve import build_app

NAME = "mini"
RULES = "Answer in few words. " * 20  # long enough to be worth keeping


@pytest.fixture(scope="module")
def address():
    engine = mini_engine()
    with listening(build_app(engine, NAME)) as address:
        yield f"{address}/v1"


class Colour(BaseModel):
    """A colour."""

    name: Literal["red", "green"]


@pytest.fixture
def langchain(address):
    library = pytest.importorskip("langchain_openai", reason="langchain-openai (extra dev) is not installed")
    return library.ChatOpenAI(
        model=NAME, base_url=address, api_key="none", temperature=0, max_tokens=20, max_retries=0, stream_usage=True
    )


def test_langchain_talks_streams_and_sees_what_was_cached(langchain):
    first = langchain.invoke([("system", RULES), ("user", "hello")])
    assert isinstance(first.content, str) and first.usage_metadata["output_tokens"] <= 20
    second = langchain.invoke([("system", RULES), ("user", "hello"), ("ai", first.content), ("user", "and then?")])
    assert second.usage_metadata["input_token_details"]["cache_read"] > 0
    pieces = list(langchain.stream([("system", RULES), ("user", "hello")]))
    assert "".join(piece.content for piece in pieces) == first.content
    assert pieces[-1].usage_metadata or any(piece.usage_metadata for piece in pieces)


def test_langchain_gets_its_own_types(langchain):
    pytest.importorskip("xgrammar", reason="extra structured is not installed")
    told = langchain.with_structured_output(Colour).invoke("a colour?")
    assert isinstance(told, Colour)


def test_openais_own_helpers_and_errors(address):
    client = OpenAI(base_url=address, api_key="none", max_retries=0)
    asked = {"model": NAME, "messages": [{"role": "user", "content": [{"type": "text", "text": "a colour?"}]}]}
    free = client.chat.completions.create(**asked, max_completion_tokens=6, temperature=0, stop=["\n\n", "zzz"], seed=1)
    assert free.choices[0].finish_reason in ("stop", "length") and free.usage.completion_tokens <= 6
    *_, last = client.chat.completions.create(
        **asked, max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    assert not last.choices and last.usage.prompt_tokens == free.usage.prompt_tokens
    with pytest.raises(BadRequestError) as wrong:
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "word " * 9_000}])
    assert wrong.value.code == "context_length_exceeded"
    with pytest.raises(BadRequestError) as wrong:
        client.chat.completions.create(**asked, logprobs=True)
    assert wrong.value.param == "logprobs"
    with pytest.raises(NotFoundError) as wrong:
        client.chat.completions.create(**asked | {"model": "gpt"})
    assert wrong.value.code == "model_not_found"
    pytest.importorskip("xgrammar", reason="extra structured is not installed")
    told = client.chat.completions.parse(**asked, response_format=Colour, max_tokens=20)
    assert isinstance(told.choices[0].message.parsed, Colour)
    with client.chat.completions.stream(**asked, response_format=Colour, max_tokens=20) as events:
        assert isinstance(events.get_final_completion().choices[0].message.parsed, Colour)


def test_the_harness_scores_a_generated_task(address, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="extra harness is not installed")
    pytest.importorskip("tenacity", reason="lm-eval[api] is not installed")
    from lm_eval.tasks import TaskManager

    docs = tmp_path / "docs.jsonl"
    docs.write_text("".join(json.dumps({"question": f"Say {n}.", "answer": str(n)}) + "\n" for n in range(3)))
    (tmp_path / "say.yaml").write_text(
        f"task: say\ndataset_path: json\ndataset_kwargs:\n  data_files: {docs}\ntest_split: train\n"
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs:\n  until: ['.']\n  max_gen_toks: 8\n  temperature: 0\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    told = lm_eval.simple_evaluate(
        model="local-chat-completions",
        model_args=f"model={NAME},base_url={address}/chat/completions,num_concurrent=1,tokenized_requests=False",
        tasks=["say"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert 0 <= told["results"]["say"]["exact_match,none"] <= 1
    assert len(told["samples"]["say"]) == 3 and all(isinstance(x["resps"][0][0], str) for x in told["samples"]["say"])
