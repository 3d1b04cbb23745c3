"""Agents that run one model: their templates, and how a prompt is read. Here in full; other engines take short ways.

engine = Dense(model, tokenizer)
engine.add("judge", "You are a judge.\n{question}\nAnswer:")
call = engine.call("judge", {"question": engine.segment("Is it so?")})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textkv.cache import MethodCache
from textkv.reuse.chat import ends, words
from textkv.reuse.kvcomm.template import Ids, Part, PromptTemplate, Segment, ids_of


@dataclass(frozen=True, eq=False)
class Reading:
    """A prompt in a cache.

    Attributes:
        cache: holds every token of the prompt.
        logits: [vocabulary] of the token after it.
        computed: prompt tokens that went through the model.
        reused: whether the prompt was put together of what others have read.
        why: of that decision, in words.
    """

    cache: MethodCache
    logits: torch.Tensor
    computed: int
    reused: bool = False
    why: str = ""


@dataclass(frozen=True, eq=False)
class Call:
    """One answer of one agent.

    Attributes:
        agent: its name.
        answer: its tokens, to be given to other agents.
        text: the same in words.
        tokens: of the prompt.
        computed, reused, why: see `Reading`.
        seconds: from the prompt to its first answer token.
    """

    agent: str
    answer: Segment
    text: str
    tokens: int
    computed: int
    reused: bool
    why: str
    seconds: float


class Dense:
    """Reads every prompt from its first token to its last: the reference, and what other engines fall back to.

    Args:
        model: a text decoder; prompts run one at a time.
        tokenizer: its own.
        max_new: most tokens of an answer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new: int = 32) -> None:
        if max_new < 1:
            raise ValueError(f"max_new={max_new}: an answer has at least 1 token")
        self.model, self.tokenizer, self.max_new = model, tokenizer, max_new
        self.templates: dict[str, PromptTemplate] = {}
        self._ends = ends(model, tokenizer)

    def add(self, agent: str, template: str) -> None:
        """Makes an agent known by its prompt; see `PromptTemplate.parse`.

        Raises:
            ValueError: a name that is taken.
        """
        if agent in self.templates:
            raise ValueError(f"agent {agent!r} is there already; give each agent its own name")
        self.templates[agent] = PromptTemplate.parse(template, self.tokenizer)

    def segment(self, text: str) -> Segment:
        """A text for placeholders. What looks like a special token in it is text."""
        return Segment(words(self.tokenizer, text))

    @torch.inference_mode()
    def call(self, agent: str, given: Mapping[str, Segment]) -> Call:
        """Lets an agent answer.

        Args:
            given: a segment for each placeholder of its template.

        Raises:
            ValueError: an unknown agent, or placeholders that do not fit.
        """
        if agent not in self.templates:
            raise ValueError(f"unknown agent {agent!r}; there are {', '.join(self.templates) or 'none'}")
        begun = perf_counter()
        parts = self.templates[agent].parts({name: segment.ids for name, segment in given.items()})
        reading = self._read(agent, parts, given)
        first = int(reading.logits.argmax())
        seconds = perf_counter() - begun
        said = self._decode(reading.cache, first)
        self._after(agent, parts, given, reading)
        return Call(
            agent, self._answer(said, parts[-1].stop, reading.cache), self.tokenizer.decode(said), parts[-1].stop,
            reading.computed, reading.reused, reading.why, seconds,
        )  # fmt: skip

    def _decode(self, cache: MethodCache, token: int) -> Ids:
        said: list[int] = []
        while token not in self._ends and len(said) < self.max_new:
            said.append(token)
            # The last one too: its keys belong to the answer, which others read.
            token = int(self._forward([token], cache).argmax())
        return tuple(said)

    def _forward(self, ids: list[int], cache: MethodCache) -> torch.Tensor:
        """Logits [vocabulary] after these tokens."""
        given = torch.tensor([ids], device=self.model.device)
        return self.model(given, past_key_values=cache, logits_to_keep=1).logits[0, -1]

    # ---- what other engines do otherwise -----------------------------------------------------------------------

    def _read(self, agent: str, parts: tuple[Part, ...], given: Mapping[str, Segment]) -> Reading:
        cache, ids = MethodCache(self.model, "full"), ids_of(parts)
        return Reading(cache, self._forward(ids, cache), len(ids))

    def _after(self, agent: str, parts: tuple[Part, ...], given: Mapping[str, Segment], reading: Reading) -> None:
        """The answer is there."""

    def _answer(self, said: Ids, start: int, cache: MethodCache) -> Segment:
        """The answer as a segment; its first token lies at `start`."""
        return Segment(said)


class Prefix(Dense):
    """Plain prefix reuse: goes on from the prompt before, as far as both begin alike. Exact; it pays where prompts put
    what they share first."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new: int = 32) -> None:
        super().__init__(model, tokenizer, max_new)
        self._ids_before: list[int] = []
        self._cache: MethodCache | None = None

    def _read(self, agent: str, parts: tuple[Part, ...], given: Mapping[str, Segment]) -> Reading:
        ids, before = ids_of(parts), self._ids_before
        same = next(
            (n for n, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), min(len(ids), len(before))
        )
        # A model needs a token to go on from.
        same = min(same, len(ids) - 1)
        if self._cache is None:
            self._cache = MethodCache(self.model, "full")
        if self._cache.tokens_seen:
            self._cache.crop(same - self._cache.tokens_seen)
        self._ids_before = ids
        logits = self._forward(ids[same:], self._cache)
        return Reading(self._cache, logits, len(ids) - same, same > 0, f"{same} of {len(ids)} tokens were there")
