"""Agents that run one model: their templates, and how a prompt is read. Here in full; other engines take short ways.

engine = Dense(model, tokenizer)
engine.add("judge", "You are a judge.\n{question}\nAnswer:")
call = engine.call("judge", {"question": engine.segment("Is it so?")})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textkv.cache import MethodCache
from textkv.reuse.chat import ends, words
from textkv.reuse.kvcomm.template import (
    Ids,
    Part,
    PromptTemplate,
    Segment,
    ids_of,
    marks_of,
    outside_pictures,
    places_of,
)  # fmt: skip
from textkv.reuse.pictures import Picture
from textkv.rotary import axes_of


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
        model: a decoder of text, or of the Qwen-VL families, which may be given pictures; prompts run one at a time.
        tokenizer: its own.
        max_new: most tokens of an answer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new: int = 32) -> None:
        if max_new < 1:
            raise ValueError(f"max_new={max_new}: an answer has at least 1 token")
        self.model, self.tokenizer, self.max_new = model, tokenizer, max_new
        self.templates: dict[str, PromptTemplate] = {}
        self._ends = ends(model, tokenizer)
        self._axes = axes_of(model) is not None  # then positions are always told: the model remembers another prompt's

    def add(self, agent: str, template: str) -> None:
        """Makes an agent known by its prompt; see `PromptTemplate.parse`.

        Raises:
            ValueError: a name that is taken.
        """
        if agent in self.templates:
            raise ValueError(f"agent {agent!r} is there already; give each agent its own name")
        self.templates[agent] = PromptTemplate.parse(template, self.tokenizer)

    def segment(self, given: str | Picture) -> Segment:
        """A text for placeholders, in which what looks like a special token is text; or a picture. Raises ValueError
        for anything else."""
        if isinstance(given, Picture):
            return Segment(given.ids, picture=given)
        if not isinstance(given, str):
            raise ValueError(f"what agents share is a text or a picture, not {given!r:.40}; write it as a text")
        return Segment(words(self.tokenizer, given))

    @torch.inference_mode()
    def call(self, agent: str, given: Mapping[str, Segment]) -> Call:
        """Lets an agent answer.

        Args:
            given: a segment for each placeholder of its template.

        Raises:
            ValueError: an unknown agent, placeholders that do not fit, or something else than a segment.
        """
        if agent not in self.templates:
            raise ValueError(f"unknown agent {agent!r}; there are {', '.join(self.templates) or 'none'}")
        other = next((name for name, x in given.items() if not isinstance(x, Segment)), None)
        if other is not None:
            raise ValueError(f"placeholder {{{other}}} got a {type(given[other]).__name__}; give engine.segment(text)")
        begun = perf_counter()
        parts = self.templates[agent].parts(given)
        reading = self._read(agent, parts, given)
        first = int(reading.logits.argmax())
        seconds = perf_counter() - begun
        said = self._decode(reading.cache, first, parts[-1].behind)
        self._after(agent, parts, given, reading)
        return Call(
            agent, self._answer(said, parts[-1], reading.cache), self.tokenizer.decode(said), parts[-1].stop,
            reading.computed, reading.reused, reading.why, seconds,
        )  # fmt: skip

    def _decode(self, cache: MethodCache, token: int, place: int) -> Ids:
        """The answer that begins with a token, which gets rotary position `place`."""
        said: list[int] = []
        while token not in self._ends and len(said) < self.max_new:
            # The last one too: its keys belong to the answer, which others read.
            at = torch.full((3, 1), place + len(said))
            said.append(token)
            token = int(self._forward([token], cache, at).argmax())
        return tuple(said)

    def _run(self, parts: tuple[Part, ...], cache: MethodCache, first: int = 0) -> torch.Tensor:
        """Logits [vocabulary] after a prompt, of which the cache holds the tokens before `first`, a place between
        pictures."""
        shown = [x.picture for x in parts if x.picture is not None and x.start >= first]
        return self._forward(ids_of(parts)[first:], cache, places_of(parts)[:, first:], shown)

    def _forward(
        self, ids: list[int], cache: MethodCache, places: torch.Tensor, shown: Sequence[Picture] = ()
    ) -> torch.Tensor:
        """Logits [vocabulary] after these tokens, at rotary positions int64 [3, tokens], with the pictures in them."""
        device, given = self.model.device, {}
        if self._axes:
            number = cache.tokens_seen + torch.arange(len(ids))
            given["position_ids"] = torch.cat([number[None], places])[:, None].to(device)
        if shown:
            given["pixel_values"] = torch.cat([x.pixels for x in shown]).to(device)
            given["image_grid_thw"] = torch.cat([x.grid for x in shown]).to(device)
        read = torch.tensor([ids], device=device)
        return self.model(read, past_key_values=cache, logits_to_keep=1, **given).logits[0, -1]

    # ---- what other engines do otherwise -----------------------------------------------------------------------

    def _read(self, agent: str, parts: tuple[Part, ...], given: Mapping[str, Segment]) -> Reading:
        cache = MethodCache(self.model, "full")
        return Reading(cache, self._run(parts, cache), parts[-1].stop)

    def _after(self, agent: str, parts: tuple[Part, ...], given: Mapping[str, Segment], reading: Reading) -> None:
        """The answer is there."""

    def _answer(self, said: Ids, last: Part, cache: MethodCache) -> Segment:
        """The answer as a segment; it lies behind the last part of the prompt."""
        return Segment(said)


class Prefix(Dense):
    """Plain prefix reuse: goes on from the prompt before, as far as both begin alike. Exact; it pays where prompts put
    what they share first."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new: int = 32) -> None:
        super().__init__(model, tokenizer, max_new)
        self._before: list = []
        self._cache: MethodCache | None = None

    def _read(self, agent: str, parts: tuple[Part, ...], given: Mapping[str, Segment]) -> Reading:
        marks, before = marks_of(parts), self._before
        same = next(
            (n for n, (a, b) in enumerate(zip(marks, before, strict=False)) if a != b), min(len(marks), len(before))
        )
        # A model needs a token to go on from.
        same = outside_pictures(parts, min(same, len(marks) - 1))
        # Should the reading stop half-way, nothing is known of what was there.
        cache = MethodCache(self.model, "full") if self._cache is None else self._cache
        self._cache, self._before = None, []
        if cache.tokens_seen:
            cache.crop(same - cache.tokens_seen)
        logits = self._run(parts, cache, same)
        self._cache, self._before = cache, marks
        return Reading(cache, logits, len(marks) - same, same > 0, f"{same} of {len(marks)} tokens were there")
