"""Turns of one to five tokens through the server's conversations: what `MethodCache` says when it is used directly.

`model.generate` hides tokens of the padding's id when it is given no mask, also those that the model itself has said.
The server never does, and whoever compares must say so too: `attention_mask` of ones.
"""

import random

import pytest
import torch

from tests.textkv import tiny
from textkv import MethodCache
from textkv.serve import ChatEngine
from textkv.serve.protocol import read_request

FIRST = 0x100  # the character of token 0


class Characters:
    """A tokenizer of which every token is a character, the padding's too: what is said is read back as it was."""

    chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

    def apply_chat_template(self, messages, chat_template, **options):
        return "".join(message["content"] for message in messages)

    def __call__(self, text, **options):
        return {"input_ids": torch.tensor([[ord(c) - FIRST for c in text]])}

    def decode(self, ids, **options):
        return "".join(chr(FIRST + i) for i in ids)


@pytest.fixture(scope="module")
def model():
    return tiny.build("llama")


class Told:
    """One conversation: what was said, and the cache that a user of the library has for it."""

    def __init__(self, model, method, budget):
        self.model, self.cache, self.messages = model, MethodCache(model, method, budget), []

    def library(self, ids, tokens):
        mask = torch.ones_like(ids)
        options = dict(attention_mask=mask, do_sample=False, max_new_tokens=tokens)
        return self.model.generate(ids, past_key_values=self.cache, **options)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("method", "budgets"), [("snapkv", (0.1, 0.2, 0.5, "2t", "8t")), ("streaming_llm", (0.5, "8t"))]
)
@pytest.mark.parametrize("begins", [0, 7], ids=["begins with the padding's token", "begins with a word"])
def test_short_turns_of_several_conversations(model, method, budgets, begins):
    found = 0
    for seed in range(3):
        dice = random.Random(seed)
        budget = dice.choice(budgets)
        engine = ChatEngine(model, Characters(), method, budget)
        talks = [Told(model, method, budget) for _ in range(dice.choice((1, 2, 3)))]
        for turn in range(6 * len(talks)):
            talk = dice.choice(talks)
            new = [dice.randrange(model.config.vocab_size) for _ in range(dice.randint(1, 5))]
            if not talk.messages:
                # Which of them it is: two that begin alike would share a cache.
                new = [begins, 10 + talks.index(talk), *new]
            talk.messages.append({"role": "user", "content": Characters().decode(new)})
            tokens = dice.randint(1, 4)
            asked = {"model": "m", "messages": talk.messages, "temperature": 0, "max_tokens": tokens}
            prepared = engine.prepare(read_request(asked))
            outcome = engine.answer(prepared, lambda text: None, lambda: False)
            said = talk.library(prepared.inputs["input_ids"], tokens)
            assert outcome.text == Characters().decode(said), (seed, budget, turn)
            found += outcome.cached_tokens > 0
            talk.messages.append({"role": "assistant", "content": outcome.text})
    assert found > 10
