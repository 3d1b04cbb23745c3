"""KVCOMM: prompts put together of what other prompts have read, with estimated offsets (arXiv 2510.12872)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from time import perf_counter

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textkv.cache import MethodCache
from textkv.reuse.chat import words
from textkv.reuse.kvcomm.anchors import AnchorPool, Criteria, Offset, Verdict
from textkv.reuse.kvcomm.blend import blended
from textkv.reuse.kvcomm.engine import Dense, Reading
from textkv.reuse.kvcomm.template import Ids, Part, Segment, ids_of
from textkv.reuse.spans import Span, Spans

DUMMY = "some text"
"""Stands in each placeholder while the fixed pieces of a template are read."""
HEADER = "Text:\n"
"""What a text is read behind, when it is read by itself."""


class Based(Dense):
    """An engine whose segments have base KV: texts read by themselves behind a short header, answers as their agent
    wrote them (as in the released code: it is free, and is what was measured).

    Args:
        model: a text decoder of full attention.
        most_bytes: of the base KV of texts; the text that was not asked for longest leaves first. None = no bound.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_new: int = 32,
        most_bytes: int | None = None,
    ) -> None:
        super().__init__(model, tokenizer, max_new)
        self.spans = Spans(model)
        self._most_bytes = most_bytes
        self._fixed: dict[str, list[Span]] = {}
        self._texts: OrderedDict[Ids, Segment] = OrderedDict()

    @torch.inference_mode()
    def add(self, agent: str, template: str) -> None:
        """Makes an agent known, and reads its fixed pieces once, with a dummy text in each placeholder."""
        super().add(agent, template)
        dummy = words(self.tokenizer, DUMMY)
        parts = self.templates[agent].parts(dict.fromkeys(self.templates[agent].names, dummy))
        cache = MethodCache(self.model, "full")
        self._forward(ids_of(parts), cache)
        self._fixed[agent] = [self.spans.cut(cache, part.start, part.stop) for part in parts if part.name is None]

    @torch.inference_mode()
    def segment(self, text: str) -> Segment:
        """A text with its base KV, read now unless it is still there."""
        ids = words(self.tokenizer, text)
        known = self._texts.get(ids)
        if known is None:
            begun = perf_counter()
            known = Segment(ids, self._base(ids))
            self.base_seconds += perf_counter() - begun
            self._texts[ids] = known
        self._texts.move_to_end(ids)
        while self._most_bytes is not None and self.text_bytes > self._most_bytes and self._texts:
            # Whoever holds the segment keeps it: it only has to be read again when asked for by its text.
            self._texts.popitem(last=False)
        return known

    @property
    def text_bytes(self) -> int:
        """Bytes of the base KV that is kept of texts."""
        return sum(segment.base.nbytes for segment in self._texts.values())

    def _base(self, ids: Ids) -> Span:
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        header = [*start, *self.tokenizer(HEADER, add_special_tokens=False)["input_ids"]]
        cache = MethodCache(self.model, "full")
        self._forward([*header, *ids], cache)
        return self.spans.cut(cache, len(header), len(header) + len(ids))

    def _answer(self, said: Ids, start: int, cache: MethodCache) -> Segment:
        return Segment(said, self.spans.cut(cache, start, start + len(said)))

    def _bases(self, agent: str, parts: tuple[Part, ...], given: Mapping[str, Segment]) -> list[Span]:
        """Base KV of each part.

        Raises:
            ValueError: a segment without, or of another model.
        """
        bases = []
        for part in parts:
            base = self._fixed[agent][part.number] if part.name is None else given[part.name].base
            if base is None:
                raise ValueError(
                    f"the text for {{{part.name}}} has no base KV; make it by segment(text) of this engine"
                )
            self.spans.check(base)
            bases.append(base)
        return bases

    def _finish(self, whole: Span, parts: tuple[Part, ...], why: str) -> Reading:
        """Puts a prompt's KV into a cache, all but the last token's, which the model reads to go on from."""
        ids = ids_of(parts)
        cache = self.spans.cache(whole.first(len(ids) - 1)) if len(ids) > 1 else MethodCache(self.model, "full")
        return Reading(cache, self._forward(ids[-1:], cache), 1, True, why)


class KVComm(Based):
    """Shares KV between agents where their anchors allow it, and reads densely where not.

    Args:
        model: a text decoder of full attention.
        criteria: when a text is estimated, and how anchors are weighted.
        capacity: anchors of each placeholder; 0 = every prompt is read densely.
        oldest: of so many oldest anchors the least used one leaves.
        most_bytes: bytes of each placeholder's anchors, and of the base KV of texts; None = no bound.

    Attributes:
        pools: anchors by the name of their placeholder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_new: int = 32,
        *,
        criteria: Criteria | None = None,
        capacity: int = 20,
        oldest: int = 5,
        most_bytes: int | None = None,
    ) -> None:
        super().__init__(model, tokenizer, max_new, most_bytes)
        self._pool = lambda: AnchorPool(criteria, capacity, oldest, most_bytes)
        self._pool()  # bounds that cannot be are refused now
        self.pools: dict[str, AnchorPool] = {}

    def add(self, agent: str, template: str) -> None:
        """Makes an agent known, and pools for placeholders that are new."""
        super().add(agent, template)
        for name in self.templates[agent].names:
            self.pools.setdefault(name, self._pool())

    @property
    def nbytes(self) -> int:
        """Bytes kept: base KV of texts and fixed pieces, and anchors."""
        fixed = sum(span.nbytes for pieces in self._fixed.values() for span in pieces)
        return self.text_bytes + fixed + sum(pool.nbytes for pool in self.pools.values())

    def judge(self, agent: str, given: Mapping[str, Segment]) -> dict[str, Verdict]:
        """For each placeholder of an agent whether its text would be estimated."""
        return {name: self.pools[name].judge(agent, given[name]) for name in self.templates[agent].names}

    def _read(self, agent: str, parts: tuple[Part, ...], given: Mapping[str, Segment]) -> Reading:
        bases = self._bases(agent, parts, given)
        verdicts = self.judge(agent, given)
        against = [f"{{{name}}}: {verdict.why}" for name, verdict in verdicts.items() if not verdict.share]
        if against:
            reading = super()._read(agent, parts, given)
            return Reading(reading.cache, reading.logits, reading.computed, False, "; ".join(against))
        for number, part in enumerate(parts):
            if part.name is not None:
                pool, verdict = self.pools[part.name], verdicts[part.name]
                pool.used(verdict)
                bases[number : number + 2] = blended(
                    *bases[number : number + 2], verdict.anchors, agent, pool.criteria, self.spans.turned
                )
        why = "; ".join(f"{{{name}}}: {verdict.why}" for name, verdict in verdicts.items())
        return self._finish(self.spans.placed(bases), parts, why)

    def _after(self, agent: str, parts: tuple[Part, ...], given: Mapping[str, Segment], reading: Reading) -> None:
        """A prompt that was read densely teaches: each text that could not be estimated becomes an anchor."""
        if reading.reused:
            return
        bases = self._bases(agent, parts, given)
        real = [self.spans.cut(reading.cache, part.start, part.stop) for part in parts]
        for number, part in enumerate(parts):
            # Asked again: an anchor that was added just now may be of the same pool.
            if part.name is not None and not self.pools[part.name].judge(agent, given[part.name]).share:
                offset = Offset(real[number] - bases[number], real[number + 1] - bases[number + 1])
                self.pools[part.name].add(agent, given[part.name], offset)
