"""Verifying drafts with a guider of the diffusion model's own vocabulary: ids go over as they are.

A round feeds what the guider has not read of the text, its last token included, and then the drafts but the last; the
logits of the i-th of these inputs judge draft i. Afterwards the cache holds the text but for its last token. One number
per row says how far the guider has read, and it follows from the canvas: the authors' code keeps a second one, which
goes wrong when several chunks are accepted.
"""

from __future__ import annotations

from functools import partial

import torch

from dlm.canvas import Canvas
from dlm.models.decoding_spec import DecodingSpec
from dlm.unmask.accept import Acceptance, DraftScores
from dlm.unmask.guider import Guider
from dlm.unmask.guider_cache import Counted, GuiderCache
from dlm.unmask.noise import Noise


class SharedVocabularyVerifier:
    """Verifies drafts where a token has the same id in both models; rows share a guider cache where they can.

    Args:
        chunk: drafts that one forward of the guider judges; the next chunk is read only if all of one was accepted.
    """

    def __init__(
        self, guide: Guider, canvas: Canvas, spec: DecodingSpec, accept: Acceptance, chunk: int,
        noise: Noise,
    ) -> None:  # fmt: skip
        self.guide, self.accept, self.chunk, self.noise, self.counted = guide, accept, chunk, noise, Counted()
        device = canvas.ids.device
        own, width = guide.ends(), guide.vocabulary
        # Both models' ends: in one vocabulary an end of the diffusion model may be an ordinary token to the guider.
        ends = sorted({*own, *(i for i in spec.eos_ids if i < width)})
        self.ends = torch.tensor(ends, dtype=torch.int64, device=device)
        self.dlm_ends = torch.tensor(spec.eos_ids, dtype=torch.int64, device=device)
        batch = canvas.batch
        # A method evicts by row; DynamicCache holds all rows at once, and one forward serves the whole batch.
        alone = guide.method is not None
        rows = [slice(i, i + 1) for i in range(batch)] if alone else [slice(0, batch)]
        self.caches = [GuiderCache(guide, r, device, self.counted) for r in rows]
        self.have = canvas.real_start.tolist()
        """Per row the first slot that the guider has not read."""
        self.asked: dict[int, tuple[list[int], int]] = {}
        """Per cache of the last round: where each row's text ended (-1 = it was not asked), and the columns asked."""

    def verify(self, canvas: Canvas, drafts: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """int64 [batch], how many drafts of each row the guider accepts from the left.

        Args:
            drafts: int64 [batch, r], for slots from the row's first mask on.
            masked: bool [batch, r], those that are there: a prefix of each row.
        """
        if drafts.shape[1] == 0:
            return drafts.new_zeros(len(drafts))
        # What became of the last drafts is known only now: an end of text may have filled slots that the guider read.
        self.settle(canvas)
        return torch.cat([self._verify(cache, canvas, drafts, masked) for cache in self.caches])

    def _uniform(self, cache: GuiderCache, asking: torch.Tensor) -> torch.Tensor:
        noise = self.noise if len(self.caches) == 1 else self.noise.of_row(cache.rows.start)
        return noise.uniform(asking).flatten()

    def take_rows(self, rows: torch.Tensor) -> None:
        """Keeps rows int64 [kept] (CPU) of the batch."""
        kept = rows.tolist()
        self.have = [self.have[row] for row in kept]
        if self.guide.method is None:
            self.caches[0].take_rows(rows)
            for cache, (before, fed) in self.asked.items():
                self.asked[cache] = [before[row] for row in kept], fed
            return
        # One cache a row: those that stay are numbered anew.
        self.caches = [self.caches[row] for row in kept]
        self.asked = {new: self.asked[old] for new, old in enumerate(kept) if old in self.asked}
        for row, cache in enumerate(self.caches):
            cache.rows = slice(row, row + 1)

    def settle(self, canvas: Canvas) -> None:
        """Takes back what was read of drafts that did not become text; the caches hold x[:p-1] then."""
        ends = _text_ends(canvas)
        for index, (before, columns) in self.asked.items():
            cache = self.caches[index]
            counts = []
            for row, old in zip(range(cache.rows.start, cache.rows.stop), before, strict=True):
                counts.append(0 if old < 0 else min(ends[row] - old, columns))
                if old >= 0:
                    # Of the columns asked the first was the text's last token, hence the one less.
                    self.have[row] = old - 1 + counts[-1]
            cache.keep(counts, columns)
        self.asked = {}

    def _verify(self, cache: GuiderCache, canvas: Canvas, drafts: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        rows, width = cache.rows, drafts.shape[1]
        ids, drafts, masked = canvas.ids[rows], drafts[rows], masked[rows]
        ends = _text_ends(canvas)[rows]
        alive = [end < canvas.length for end in ends]
        count = drafts.new_zeros(cache.size)
        if not any(alive):
            return count
        text, real = self._unread(cache, ids, ends, alive)
        if self.guide.method is not None and not cache.columns:
            cache.read_prompt(text)
            text, real = text[:, :0], real[:, :0]
        # Input i judges draft i: the text's last token judges the first draft, the drafts but the last judge the rest.
        last = ids.gather(1, torch.tensor(ends, device=ids.device)[:, None] - 1)
        asked = self._known(torch.cat([last, drafts[:, :-1]], 1))
        # Every end of the diffusion model counts as the guider's first one, as DraftScores has it.
        judged = torch.where(torch.isin(drafts, self.dlm_ends), self.ends[0], drafts) if len(self.ends) else drafts
        going, fed = masked[:, 0], 0
        while True:
            part = slice(fed, min(fed + self.chunk, width))
            tokens, there = torch.cat([text, asked[:, part]], 1), torch.cat([real, masked[:, part]], 1)
            logits = cache.forward(tokens, there, part.stop - part.start)
            seen = DraftScores(logits.flatten(0, 1), judged[:, part].flatten(), self.ends)
            asking = masked[:, part] & going[:, None]
            uniform = partial(self._uniform, cache, asking)
            agreed = (self.accept(seen, uniform).view(cache.size, -1) & masked[:, part]).long().cumprod(1)
            # [batch]: a row whose chunk was not accepted whole reads on beside the others, but counts no more.
            count = count + agreed.sum(1) * going
            going = going & (agreed[:, -1] > 0)
            fed, text, real = part.stop, text[:, :0], real[:, :0]
            if fed == width or not bool(going.any()):
                break
        self.asked[self.caches.index(cache)] = [e if a else -1 for e, a in zip(ends, alive, strict=True)], fed
        return count

    def _unread(
        self, cache: GuiderCache, ids: torch.Tensor, ends: list[int], alive: list[bool]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Text that the guider has not read, without its last token: [rows, t], aligned on the right, and bool of what
        is there."""
        have = [self.have[row] for row in range(cache.rows.start, cache.rows.stop)]
        stop = [end - 1 if a else have[i] for i, (end, a) in enumerate(zip(ends, alive, strict=True))]
        longest = max(s - h for s, h in zip(stop, have, strict=True))
        bounds = torch.tensor([have, stop], device=ids.device)[..., None]
        # Aligned on the right, so that the drafts begin in the same column in every row.
        slots = bounds[1] - longest + torch.arange(longest, device=ids.device)
        return self._known(ids.gather(1, slots.clamp(min=0))), slots >= bounds[0]

    def _known(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens that the guider can read: an id it does not have becomes its end of text."""
        # An index outside the embedding is an error on the CPU and undefined on a GPU.
        stand_in = int(self.guide.ends()[0]) if self.guide.ends() else 0
        return tokens.masked_fill(tokens >= self.guide.vocabulary, stand_in)

    @property
    def cache_columns(self) -> list[int]:
        """Columns held in each guider cache."""
        return [cache.columns for cache in self.caches]


def _text_ends(canvas: Canvas) -> list[int]:
    """Per row the first slot with a mask: guided text grows from the left, so its masks are the end of the row."""
    return (canvas.length - canvas.left_cpu).tolist()
