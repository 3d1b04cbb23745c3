"""Verifying drafts with a guider of another vocabulary: both token sequences are aligned by characters.

Text and draft are decoded and encoded anew with the guider's tokenizer. Then every token of either model covers a span
[start, end) of the same string. The first token that the guider rejects starts at some character; the drafted tokens
that end there or before are accepted. (The authors' code encodes chunk by chunk, after which spans no longer
correspond.) The prompt is translated once and for itself; what follows is encoded anew each round, and the guider's
cache keeps the longest prefix that did not change.

A special token counts as one character and becomes what `Guider.specials` says; at one that it does not name, the draft
ends.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch

from dlm.canvas import Canvas
from dlm.models.decoding_spec import DecodingSpec
from dlm.unmask.accept import Acceptance, DraftScores
from dlm.unmask.guider import Guider, special_ids
from dlm.unmask.guider_cache import Counted, GuiderCache
from dlm.unmask.noise import Noise

_TAIL = 8  # tokens before a draft that are decoded with it: what a tokenizer may join across the border


@dataclass(frozen=True)
class Alignment:
    """Two token sequences over the same characters.

    Attributes:
        ids: the guider's tokens.
        guider_starts, guider_ends: characters [start, end) of the guider's tokens.
        dlm_ends: where each of the diffusion model's tokens ends; one that is a part of a character ends where the
            character does.
        unmapped: where the first drafted special token stands that the guider has no ids for; the number of characters
            if there is none.
    """

    ids: list[int]
    guider_starts: list[int]
    guider_ends: list[int]
    dlm_ends: list[int]
    unmapped: int


class CharacterAligner:
    """Aligns the diffusion model's ids with the guider's."""

    def __init__(self, guide: Guider, spec: DecodingSpec) -> None:
        self.own, self.dlm = guide.tokenizer, guide.dlm_tokenizer
        ends = guide.ends()
        # All the model's ends become the guider's first: whoever ends a text, the two agree that it ends.
        self.specials = {i: tuple(ends[:1]) for i in spec.eos_ids} if ends else {}
        self.specials |= {i: tuple(own) for i, own in guide.specials.items()}
        self.standalone = special_ids(self.dlm) | set(spec.eos_ids) | set(guide.specials)

    def align(self, ids: list[int], drafted: int) -> Alignment:
        """Aligns `ids`, of which those from index `drafted` on are a draft. Of the text before it only the last token
        gets its place in `dlm_ends`, the others -1: nobody asks where they end."""
        out, starts, ends, dlm_ends = [], [], [], []
        unmapped, place = None, 0
        # Runs of plain tokens are decoded together: a character may be spread over several of them.
        for special, run in groupby(ids, self.standalone.__contains__):
            run = list(run)
            if special:
                for token in run:
                    own = self.specials.get(token, ())
                    if unmapped is None and not own and len(dlm_ends) >= drafted:
                        unmapped = place
                    out += own
                    # Several guider tokens may stand for one special token; all of them cover that one character.
                    starts += [place] * len(own)
                    place += 1
                    ends += [place] * len(own)
                    dlm_ends.append(place)
                continue
            text = self._decode(run)
            coded = self.own(text, add_special_tokens=False, return_offsets_mapping=True)
            out += coded["input_ids"]
            starts += [place + a for a, _ in coded["offset_mapping"]]
            ends += [place + b for _, b in coded["offset_mapping"]]
            last = self._ends(run, text, drafted - 1 - len(dlm_ends))
            dlm_ends += [place + end if end >= 0 else -1 for end in last]
            place += len(text)
        return Alignment(out, starts, ends, dlm_ends, place if unmapped is None else unmapped)

    def _ends(self, run: list[int], text: str, first: int) -> list[int]:
        """Where the tokens of a run end in its text, -1 before index `first`."""
        first = min(max(first, 0), len(run))
        tail = max(0, first - _TAIL)
        # Decoding from the run's start for every token would be quadratic; a tail of eight tokens is enough as long as
        # it reads the same on its own.
        before = len(text) - len(self._decode(run[tail:]))
        if not text.endswith(self._decode(run[tail:])):
            tail = before = 0  # the tail reads differently on its own
        ends, end = [-1] * len(run), len(text)
        # From the back: a token that is a part of a character ends where the one behind it does.
        for i in range(len(run) - 1, first - 1, -1):
            so_far = self._decode(run[tail : i + 1])
            if text.startswith(so_far, before):  # it does not where a character is cut in two
                end = before + len(so_far)
            ends[i] = end
        return ends

    def _decode(self, ids: list[int]) -> str:
        return self.dlm.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class AlignedVerifier:
    """Verifies drafts where the vocabularies differ; one guider cache per row. Arguments as `SharedVocabularyVerifier`.

    Raises:
        ValueError: a prompt in which the guider can read nothing.
    """

    def __init__(
        self, guide: Guider, canvas: Canvas, spec: DecodingSpec, accept: Acceptance, chunk: int,
        noise: Noise,
    ) -> None:  # fmt: skip
        self.guide, self.accept, self.chunk, self.noise, self.counted = guide, accept, chunk, noise, Counted()
        self.device = canvas.ids.device
        self.aligner = CharacterAligner(guide, spec)
        self.ends = torch.tensor(guide.ends(), dtype=torch.int64, device=self.device)
        self.caches = [GuiderCache(guide, slice(i, i + 1), self.device, self.counted) for i in range(canvas.batch)]
        self.prompts = []
        for ids, start, end in zip(*(x.tolist() for x in (canvas.ids, canvas.real_start, canvas.tail)), strict=True):
            prompt = self.aligner.align(ids[start:end], end).ids
            if not prompt:
                raise ValueError(
                    "the guider can read nothing of a prompt that consists of special tokens; name what they are to it "
                    "in Guider(specials=...)"
                )
            self._check_length(len(prompt) + 1)
            self.prompts.append(prompt)
        self.held: list[list[int]] = [[] for _ in self.caches]

    def verify(self, canvas: Canvas, drafts: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """int64 [batch], how many drafts of each row the guider accepts from the left.

        Arguments as in `SharedVocabularyVerifier`.
        """
        rows = zip(canvas.ids.tolist(), canvas.tail.tolist(), strict=True)
        texts, left = [ids[begin:] for ids, begin in rows], canvas.left_cpu.tolist()
        given = [row[:n] for row, n in zip(drafts.tolist(), masked.sum(1).tolist(), strict=True)]
        counts = [
            self._verify(i, text[: len(text) - masks], draft) if draft else 0
            for i, (text, masks, draft) in enumerate(zip(texts, left, given, strict=True))
        ]
        return torch.tensor(counts, device=self.device)

    def _verify(self, row: int, text: list[int], draft: list[int]) -> int:
        aligned = self.aligner.align(text + draft, len(text))
        begin = aligned.dlm_ends[len(text) - 1] if text else 0
        first = bisect_right(aligned.guider_ends, begin)  # the first of the guider's tokens that reaches into the draft
        accepted = self._count_accepted(row, self.prompts[row] + aligned.ids, len(self.prompts[row]) + first)
        # Two bounds: the first special token without a name, and the first token that the guider would say otherwise.
        limit = aligned.unmapped
        if first + accepted < len(aligned.ids):
            limit = min(limit, aligned.guider_starts[first + accepted])
        return sum(end <= limit for end in aligned.dlm_ends[len(text) :])

    def _count_accepted(self, row: int, stream: list[int], first: int) -> int:
        """How many tokens of the stream the guider accepts from index `first` on."""
        cache, held = self.caches[row], self.held[row]
        self._check_length(len(stream))
        if self.guide.method is not None and not held:
            # The last prompt token is not compressed: it is fed with the first draft, which its logits judge.
            held = self.prompts[row][:-1]
            cache.read_prompt(torch.tensor([held], dtype=torch.int64, device=self.device))
        # New drafts may change how the text before them is encoded, so the common prefix is looked for, not assumed.
        same = next((i for i, (a, b) in enumerate(zip(held, stream, strict=False)) if a != b), len(held))
        # One token before the first judged one is always fed: its logits judge that one.
        fed = min(same, first - 1)
        cache.drop(len(held) - fed)
        total = 0
        for start in range(first, len(stream), self.chunk):
            stop = min(start + self.chunk, len(stream))
            tokens = torch.tensor([stream[fed : stop - 1]], device=self.device)
            drafts = torch.tensor(stream[start:stop], device=self.device)
            seen = DraftScores(cache.forward(tokens, None, stop - start)[0], drafts, self.ends)
            accepted = int(self.accept(seen, partial(self._uniform, row, stop - start)).long().cumprod(0).sum())
            fed, total = stop - 1, total + accepted
            if accepted < stop - start:
                break
        # Rejected drafts too: whatever of them turns out to be text next round need not be read again.
        self.held[row] = stream[:fed]
        return total

    def _uniform(self, row: int, count: int) -> torch.Tensor:
        return self.noise.of_row(row).uniform(torch.ones(1, count, dtype=torch.bool, device=self.device))[0]

    def take_rows(self, rows: torch.Tensor) -> None:
        """Keeps rows int64 [kept] (CPU) of the batch."""
        for name in ("caches", "prompts", "held"):
            setattr(self, name, [getattr(self, name)[row] for row in rows.tolist()])

    def _check_length(self, tokens: int) -> None:
        if self.guide.context is not None and tokens > self.guide.context:
            raise ValueError(
                f"the text takes {tokens} of the guider's tokens and it has {self.guide.context} positions; shorten "
                "the prompt or generate less"
            )

    @property
    def cache_columns(self) -> list[int]:
        """Columns held in each guider cache."""
        return [cache.columns for cache in self.caches]
