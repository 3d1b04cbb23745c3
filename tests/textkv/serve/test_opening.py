"""Templates that drop old reasoning: a conversation goes on from its state before the answer."""

from __future__ import annotations

from starlette.testclient import TestClient

from tests.textkv.serve.live import mini_engine
from textkv.mini import load_mini
from textkv.serve import ChatEngine, build_app
from textkv.serve.opening import AnswerOpening
from textkv.serve.template import PLAIN

# As reasoning models have it: an answer is opened with an empty thought, of which history knows nothing.
DROPS = (
    "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'].split('</think>')[-1].strip() }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n<think>\n\n</think>\n\n{% endif %}"
)
RULES = "Answer in few words, and go on with the story of the man who came. " * 3


def talk(engine, turns=3):
    """Answers and (cached, prompt) tokens of every turn."""
    messages, told = [], []
    with TestClient(build_app(engine, "mini")) as client:
        for turn in range(turns):
            messages.append({"role": "user", "content": f"{RULES} {turn}"})
            body = {"model": "mini", "messages": messages, "temperature": 0, "max_tokens": 12}
            answer = client.post("/v1/chat/completions", json=body).json()
            usage, text = answer["usage"], answer["choices"][0]["message"]["content"]
            messages.append({"role": "assistant", "content": text})
            told.append((text, usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]))
    return told


def test_a_template_says_whether_it_keeps_what_opened_an_answer():
    tokenizer = load_mini()[1]
    assert AnswerOpening.of(tokenizer, PLAIN).lasting
    found = AnswerOpening.of(tokenizer, DROPS)
    assert not found.lasting and "think" in tokenizer.decode(found.ids)


def test_turns_go_on_although_the_template_drops_what_was_read():
    told = talk(ChatEngine(*load_mini(), "snapkv", "0.5", chat_template=DROPS))
    opening = len(AnswerOpening.of(load_mini()[1], DROPS).ids)
    assert [cached for _, cached, _ in told] == [0, told[0][2] - opening, told[1][2] - opening]


def test_with_nothing_dropped_answers_are_those_of_a_fresh_prompt():
    kept = talk(ChatEngine(*load_mini(), "full", chat_template=DROPS))
    fresh = talk(ChatEngine(*load_mini(), "full", chat_template=DROPS, memory=1))
    assert [text for text, _, _ in kept] == [text for text, _, _ in fresh]
    assert all(cached == 0 for _, cached, _ in fresh)


def test_a_template_that_keeps_all_costs_no_copy(monkeypatch):
    monkeypatch.setattr("textkv.conversation.Conversation.fork", None)
    assert talk(mini_engine())[1][1] > 0
