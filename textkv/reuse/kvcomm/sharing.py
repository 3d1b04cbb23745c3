"""KVCOMM: prompts put together of what other prompts have read, with estimated offsets (arXiv 2510.12872)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textkv.cache import MethodCache
from textkv.reuse.chat import words
from textkv.reuse.kvcomm.anchors import AnchorPool, Criteria, Offset
from textkv.reuse.kvcomm.blend import blended
from textkv.reuse.kvcomm.engine import Dense, Reading
from textkv.reuse.kvcomm.template import Ids, Key, Part, PromptTemplate, Segment, outside_pictures
from textkv.reuse.spans import Span, Spans

DUMMY = "some text"
"""Stands in each placeholder while the fixed pieces of a template are read."""
HEADER = "Text:\n"
"""What a text is read behind, when it is read by itself."""


class Based(Dense):
    """An engine whose segments have base KV: texts read by themselves behind a short header, answers as their agent
    wrote them (as in the released code: it is free, and is what was measured).

    Args:
        model: a decoder of full attention.
        most_bytes: of the base KV of texts; the text that was not asked for longest leaves first, and is read again
            when it comes back. None = no bound.
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
        self._texts: OrderedDict[Key, Span] = OrderedDict()

    @torch.inference_mode()
    def add(self, agent: str, template: str) -> None:
        """Makes an agent known, and reads its fixed pieces once, with a dummy text in each placeholder."""
        super().add(agent, template)
        dummy = words(self.tokenizer, DUMMY)
        parts = self.templates[agent].parts(dict.fromkeys(self.templates[agent].names, dummy))
        cache = MethodCache(self.model, "full")
        self._run(parts, cache)
        self._fixed[agent] = [self.spans.cut(cache, part.start, part.stop) for part in parts if part.name is None]

    @property
    def text_bytes(self) -> int:
        """Bytes of the base KV that is kept of texts."""
        return sum(base.nbytes for base in self._texts.values())

    def _base(self, agent: str, part: Part, given: Mapping[str, Segment]) -> Span:
        """Base KV of a part; of a text without, it is read by itself the first time that it is asked for.

        Raises:
            ValueError: a segment of another model.
        """
        if part.name is None:
            return self._fixed[agent][part.number]
        base = given[part.name].base
        if base is not None:
            self.spans.check(base)
            return base
        text = part.segment
        if text.key not in self._texts:
            self._texts[text.key] = self._alone(text)
        self._texts.move_to_end(text.key)
        base = self._texts[text.key]
        while self._most_bytes is not None and self.text_bytes > self._most_bytes and self._texts:
            self._texts.popitem(last=False)
        return base

    def _alone(self, text: Segment) -> Span:
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        header = (*start, *self.tokenizer(HEADER, add_special_tokens=False)["input_ids"])
        parts = PromptTemplate((header, ()), ("text",)).parts({"text": text})
        cache = MethodCache(self.model, "full")
        self._run(parts, cache)
        return self.spans.cut(cache, parts[1].start, parts[1].stop, parts[1].place)

    def _answer(self, said: Ids, last: Part, cache: MethodCache) -> Segment:
        return Segment(said, self.spans.cut(cache, last.stop, last.stop + len(said), last.behind))


class KVComm(Based):
    """Shares KV between agents where their anchors allow it, and reads densely where not.

    Args:
        model: a decoder of full attention.
        criteria: when a text is estimated, and how anchors are weighted.
        capacity: anchors of each placeholder; 0 = every prompt is read densely.
        oldest: of so many oldest anchors the least used one leaves.
        most_bytes: bytes of each placeholder's anchors, and of the base KV of texts; None = no bound.
        fresh: last tokens of every prompt that the model reads, over what was put together before them. 1 is the
            paper; more of them cost little, and a text that lies wholly in them (a question, short answers) is neither
            estimated nor kept.

    Attributes:
        pools: anchors by the name of their placeholder.

    Raises:
        ValueError: a bound below its least, or a model that `Spans` refuses.
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
        fresh: int = 1,
    ) -> None:
        super().__init__(model, tokenizer, max_new, most_bytes)
        if fresh < 1:
            raise ValueError(
                f"fresh={fresh}: the model reads at least the last token, or there is nothing to go on from"
            )
        self._pool = lambda: AnchorPool(criteria, capacity, oldest, most_bytes)
        self._pool()  # bounds that cannot be are refused now
        self.pools: dict[str, AnchorPool] = {}
        self.fresh = fresh

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

    def _known(self, parts: tuple[Part, ...]) -> int:
        """The first of the tokens that are always read: the last `fresh` ones, and the picture that they cut."""
        return outside_pictures(parts, max(0, parts[-1].stop - self.fresh))

    def _stored(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        """The parts that begin before the tokens that are always read."""
        return tuple(part for part in parts if part.start < self._known(parts))

    def _read(self, agent: str, parts: tuple[Part, ...], given: Mapping[str, Segment]) -> Reading:
        stored = self._stored(parts)
        bases = [self._base(agent, part, given) for part in stored]
        verdicts = {
            number: self.pools[part.name].judge(agent, replace(part.segment, base=bases[number]))
            for number, part in enumerate(stored)
            if part.name is not None
        }
        against = [number for number, verdict in verdicts.items() if not verdict.share]
        why = "; ".join(f"{{{stored[n].name}}}: {verdicts[n].why}" for n in against or verdicts)
        if against or not stored:
            return replace(super()._read(agent, parts, given), why=why)
        for number, verdict in verdicts.items():
            pool = self.pools[stored[number].name]
            pool.used(verdict)
            # The fixed piece behind a text may be read anew: then there is nothing of it to estimate.
            behind = bases[number + 1] if number + 1 < len(bases) else None
            found = blended(bases[number], behind, verdict.anchors, agent, pool.criteria, self.spans.turned)
            bases[number : number + 2] = [span for span in found if span is not None]
        known = self._known(parts)
        placed = self.spans.placed(bases, [part.place for part in stored])
        cache = self.spans.cache(placed.first(known))
        return Reading(cache, self._run(parts, cache, known), parts[-1].stop - known, True, why)

    def _after(self, agent: str, parts: tuple[Part, ...], given: Mapping[str, Segment], reading: Reading) -> None:
        """A prompt that was read densely teaches: each text that could not be estimated becomes an anchor."""
        if reading.reused:
            return
        for number, part in enumerate(self._stored(parts)):
            if part.name is None:
                continue
            text = replace(part.segment, base=self._base(agent, part, given))
            if self.pools[part.name].judge(agent, text).share:
                continue
            offsets = [
                self.spans.cut(reading.cache, x.start, x.stop, x.place) - self._base(agent, x, given)
                for x in parts[number : number + 2]
            ]
            self.pools[part.name].add(agent, text, Offset(*offsets))
