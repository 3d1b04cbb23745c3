"""A question, the passages found for it, and a greedy answer on a cache of any method."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textkv.cache import MethodCache
from textkv.quoting import Quoting
from textkv.rag.index import Index, Passage


@dataclass(frozen=True)
class Answer:
    """What was said, on what.

    Attributes:
        text: the answer.
        passages: what stood in the prompt; the n-th is cited as [n].
        cited: numbers of passages that the answer itself names, from 1, ascending.
        prefill_tokens, tokens: read as a prompt, and generated, what was dropped again included.
        queries: what was searched for, in this order.
        scores: what a policy noted of words that it looked at (see `textkv.rag.atlas`).
    """

    text: str
    passages: tuple[Passage, ...]
    cited: tuple[int, ...]
    prefill_tokens: int
    tokens: int
    queries: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()


ASKED = "Answer the question in one short sentence from the passages, and name the passage as [n]."


def prompt_of(question: str, passages: Sequence[Passage], asked: str = ASKED) -> str:
    """Numbered passages, what is asked for, then the question."""
    lines = [f"[{number}] {passage.chunk.text}" for number, passage in enumerate(passages, 1)]
    return "\n".join([*lines, "", asked, f"Question: {question}"])


def chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A prompt as the model reads it: in its chat template where it has one."""
    if not tokenizer.chat_template:
        return prompt + "\nAnswer:"
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def cited_in(text: str, passages: int) -> tuple[int, ...]:
    """Numbers [n] in a text that are those of passages, from 1, ascending."""
    named = {int(number) for number in re.findall(r"\[(\d{1,4})\]", text)}
    return tuple(sorted(number for number in named if 1 <= number <= passages))


class Reader:
    """Reads and answers with one model.

    Args:
        cache: composition string of the cache under each answer, e.g. "critic".
        budget: of that method, as `MethodCache` takes it; None keeps the method's own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cache: str = "full",
        budget: float | str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.cache, self.budget = model, tokenizer, cache, budget
        self.empty()  # an unknown method is refused here, not after the search
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}

    def ask(self, question: str, index: Index, k: int = 3, most: int = 48) -> Answer:
        """One retrieval, one prefill, at most `most` tokens.

        Raises:
            ValueError: a question without a word, or nothing found that an answer could rest on.
        """
        passages = tuple(index.search(question, k))
        if not passages:
            raise ValueError(
                f"nothing in the index shares a word with {question!r}; ask otherwise, or index with vectors"
            )
        ids = self.encode(prompt_of(question, passages))
        made = self.decode(self.empty(), ids, most)
        text = self.tokenizer.decode(made, skip_special_tokens=True).strip()
        return Answer(text, passages, cited_in(text, len(passages)), ids.shape[1], len(made), (question,))

    def empty(self) -> MethodCache:
        """A new cache of the method."""
        return MethodCache(self.model, self.cache, self.budget)

    def encode(self, prompt: str) -> torch.Tensor:
        """int64 [1, tokens], in the model's chat template where it has one."""
        own = not self.tokenizer.chat_template
        if own:
            return self.tokenizer(chat(self.tokenizer, prompt), return_tensors="pt").input_ids.to(self.model.device)
        # Passages are by others: they open no turn. Where plain words do so, no library can keep them out.
        quoting = Quoting.of(self.tokenizer, self.tokenizer.chat_template)
        ids = quoting.ids(chat(self.tokenizer, quoting.piece(prompt)))
        return torch.tensor([ids], device=self.model.device)

    @torch.inference_mode()
    def decode(self, cache: MethodCache, ids: torch.Tensor, most: int) -> list[int]:
        """Greedy tokens after `ids` [1, n], which are read onto the cache; the end token is not among them."""
        made: list[int] = []
        while len(made) < most:
            token = int(self.model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax())
            if token in self.ends:
                break
            made.append(token)
            ids = ids.new_tensor([[token]])
        return made
