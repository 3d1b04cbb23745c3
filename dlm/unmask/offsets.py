"""Reading drafts with a guider of another vocabulary: through the text, by character offsets.

Text and draft are decoded, encoded with the guider's tokenizer, and laid on one line of characters on which both token
sequences have their places. The first token that the guider rejects starts somewhere on that line; the drafted tokens
that end there or before are accepted. (The authors' code encodes chunk by chunk, after which positions no longer
correspond.) The prompt is translated once and for itself; what follows is encoded anew each round, and the guider's
cache keeps the longest beginning that did not change.

Special tokens take one place on the line and become what `Guider.specials` says; of one that it does not name, the
draft ends.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from dlm.unmask.accept import Acceptance, Seen
from dlm.unmask.guider import Guider, special_ids
from dlm.unmask.lane import Lane

if TYPE_CHECKING:
    from dlm.canvas import Canvas
    from dlm.models.card import Card

_TAIL = 8  # tokens before a draft that are decoded with it: what a tokenizer may join across the border


@dataclass(frozen=True)
class Line:
    """Two token sequences on one line of characters.

    Attributes:
        ids: the guider's tokens.
        starts, ends: places of the guider's tokens, [start, end).
        theirs: where each of the diffusion model's tokens ends; one that is no whole character ends with the next.
        barrier: place of the first special token that the guider has nothing for; the line's length if none.
    """

    ids: list[int]
    starts: list[int]
    ends: list[int]
    theirs: list[int]
    barrier: int


class Translator:
    """The diffusion model's ids as a `Line`."""

    def __init__(self, guide: Guider, card: Card) -> None:
        self.own, self.dlm = guide.tokenizer, guide.dlm_tokenizer
        ends = guide.ends()
        self.specials = {i: tuple(ends[:1]) for i in card.eos_ids} if ends else {}
        self.specials |= {i: tuple(own) for i, own in guide.specials.items()}
        self.apart = special_ids(self.dlm) | set(card.eos_ids) | set(guide.specials)

    def line(self, ids: list[int], drafted: int) -> Line:
        """Lays out `ids`, of which those from index `drafted` on are a draft. Of the others only the last has its
        place in `theirs`, the rest -1."""
        out, starts, ends, theirs = [], [], [], []
        barrier, place = None, 0
        for special, run in groupby(ids, self.apart.__contains__):
            run = list(run)
            if special:
                for token in run:
                    own = self.specials.get(token, ())
                    barrier = place if barrier is None and not own and len(theirs) >= drafted else barrier
                    out += own
                    starts += [place] * len(own)
                    place += 1
                    ends += [place] * len(own)
                    theirs.append(place)
                continue
            text = self._decode(run)
            coded = self.own(text, add_special_tokens=False, return_offsets_mapping=True)
            out += coded["input_ids"]
            starts += [place + a for a, _ in coded["offset_mapping"]]
            ends += [place + b for _, b in coded["offset_mapping"]]
            theirs += [place + end if end >= 0 else -1 for end in self._ends(run, text, drafted - 1 - len(theirs))]
            place += len(text)
        return Line(out, starts, ends, theirs, place if barrier is None else barrier)

    def _ends(self, run: list[int], text: str, first: int) -> list[int]:
        """Where the tokens of a run end in its text, -1 before index `first`."""
        first = min(max(first, 0), len(run))
        tail = max(0, first - _TAIL)
        before = len(text) - len(self._decode(run[tail:]))
        if not text.endswith(self._decode(run[tail:])):
            tail = before = 0  # the tail reads differently on its own
        ends, end = [-1] * len(run), len(text)
        for i in range(len(run) - 1, first - 1, -1):
            so_far = self._decode(run[tail : i + 1])
            if text.startswith(so_far, before):  # it does not where a character is cut in two
                end = before + len(so_far)
            ends[i] = end
        return ends

    def _decode(self, ids: list[int]) -> str:
        return self.dlm.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class ByOffsets:
    """The reader for unequal vocabularies; one lane per row. Arguments as `SameIds`.

    Raises:
        ValueError: a prompt in which the guider can read nothing.
    """

    def __init__(
        self, guide: Guider, canvas: Canvas, card: Card, accept: Acceptance, chunk: int,
        generator: torch.Generator | None,
    ) -> None:  # fmt: skip
        self.guide, self.accept, self.chunk, self.generator = guide, accept, chunk, generator
        self.device = canvas.ids.device
        self.translator = Translator(guide, card)
        self.ends = torch.tensor(guide.ends(), dtype=torch.int64, device=self.device)
        self.lanes = [Lane(guide, slice(i, i + 1), self.device) for i in range(canvas.batch)]
        self.prompts = []
        for ids, start in zip(canvas.ids[:, : canvas.prompt].tolist(), canvas.real_start.tolist(), strict=True):
            prompt = self.translator.line(ids[start:], len(ids)).ids
            if not prompt:
                raise ValueError(
                    "the guider can read nothing of a prompt that consists of special tokens; name what they are to it "
                    "in Guider(specials=...)"
                )
            self._check_length(len(prompt) + 1)
            self.prompts.append(prompt)
        self.held: list[list[int]] = [[] for _ in self.lanes]

    def agree(self, canvas: Canvas, drafts: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
        """int64 [batch], how many drafts of each row the guider accepts from the left; arguments as in `SameIds`."""
        texts, left = canvas.generated.tolist(), canvas.left_cpu.tolist()
        given = [row[:n] for row, n in zip(drafts.tolist(), free.sum(1).tolist(), strict=True)]
        counts = [
            self._agree(i, text[: len(text) - masks], draft) if draft else 0
            for i, (text, masks, draft) in enumerate(zip(texts, left, given, strict=True))
        ]
        return torch.tensor(counts, device=self.device)

    def _agree(self, row: int, text: list[int], draft: list[int]) -> int:
        line = self.translator.line(text + draft, len(text))
        begin = line.theirs[len(text) - 1] if text else 0
        first = bisect_right(line.ends, begin)  # the first of the guider's tokens that reaches into the draft
        accepted = self._judge(row, self.prompts[row] + line.ids, len(self.prompts[row]) + first)
        limit = line.barrier
        if first + accepted < len(line.ids):
            limit = min(limit, line.starts[first + accepted])
        return sum(end <= limit for end in line.theirs[len(text) :])

    def _judge(self, row: int, stream: list[int], first: int) -> int:
        """How many tokens of the stream the guider accepts from index `first` on."""
        lane, held = self.lanes[row], self.held[row]
        self._check_length(len(stream))
        if self.guide.method is not None and not held:
            held = self.prompts[row][:-1]
            lane.read_prompt(torch.tensor([held], dtype=torch.int64, device=self.device))
        same = next((i for i, (a, b) in enumerate(zip(held, stream, strict=False)) if a != b), len(held))
        fed = min(same, first - 1)
        lane.drop(len(held) - fed)
        total = 0
        for start in range(first, len(stream), self.chunk):
            stop = min(start + self.chunk, len(stream))
            tokens = torch.tensor([stream[fed : stop - 1]], device=self.device)
            drafts = torch.tensor(stream[start:stop], device=self.device)
            seen = Seen(lane.forward(tokens, None, stop - start)[0], drafts, self.ends)
            accepted = int(self.accept(seen, self.generator).long().cumprod(0).sum())
            fed, total = stop - 1, total + accepted
            if accepted < stop - start:
                break
        self.held[row] = stream[:fed]
        return total

    def _check_length(self, tokens: int) -> None:
        if self.guide.context is not None and tokens > self.guide.context:
            raise ValueError(
                f"the text takes {tokens} of the guider's tokens and it has {self.guide.context} positions; shorten "
                "the prompt or generate less"
            )

    @property
    def cache_columns(self) -> list[int]:
        """Columns held in each lane's cache."""
        return [lane.columns for lane in self.lanes]
