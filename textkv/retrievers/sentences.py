"""Sentences of the text, each under the mean of its keys (SentenceKV, arXiv 2504.00970).

The query is the mean over the sentence that is being written, and over the query heads of a KV head. Products are
linear, so a sentence's score is the mean logit, before scale and softmax, between the two sentences' tokens. (The
paper's equation 2 waits for the end of the sentence; its algorithm and the authors' code use the mean so far, as here.)

A sentence ends behind a token that says so, or when it has `longest` tokens.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from textkv.retrievers.base import Retriever, register_retriever
from textkv.retrievers.buckets import Buckets, grouped


@register_retriever("sentences")
class Sentences(Buckets):
    """Means of the keys of sentences.

    Args:
        ends: ids of the tokens that end a sentence.
        longest: int64 [batch] on the CPU, most tokens of a sentence.

    Attributes:
        mean: [batch, kv_heads, buckets, head_dim] in the keys' dtype.
        log_at, log_ends: int32 and bool [batch, columns], positions (-1 = padding) of tokens that are not stored here
            yet, and whether each ends a sentence.
        said, said_at: [batch, kv_heads, u, head_dim] and int32 [batch, u], the last tokens' queries, mean over
            the query heads of a KV head, and their positions.
        begun: int64 [batch], the first position that does not belong to a sentence stored here.
    """

    def __init__(self, ends: tuple[int, ...], longest: torch.Tensor) -> None:
        super().__init__()
        self.ends, self.longest = tuple(ends), longest
        self.mean: torch.Tensor | None = None
        self.log_at = self.log_ends = self.said = self.said_at = self.begun = None

    def read(self, q: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor | None, kv_heads: int) -> None:
        """A prompt comes, before any of it is stored here.

        Args:
            q: [batch, heads, w, head_dim], its last queries.
            positions: int32 [batch, m], -1 = padding.
            ids: int64 [batch, m]; None = no token ends a sentence.
        """
        self.begun = torch.zeros(len(positions), dtype=torch.int64, device=positions.device)
        self.log_at = positions[:, :0]
        self.log_ends = positions[:, :0] > 0
        self.said = q.new_zeros(len(q), kv_heads, 0, q.shape[3])
        self.said_at = positions[:, :0]
        self.observe(q, positions, ids)

    def observe(self, q: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor | None) -> None:
        """Notes where sentences end, and the last queries: of as many tokens as a sentence may have, and as many that
        may be taken back."""
        ends = torch.zeros_like(positions, dtype=torch.bool) if ids is None else _is_end(ids, self.ends)
        self.log_at = torch.cat([self.log_at, positions], 1)
        self.log_ends = torch.cat([self.log_ends, ends.expand_as(positions)], 1)
        queries = q.unflatten(1, (self.said.shape[1], -1)).mean(2)
        at = positions[:, positions.shape[1] - q.shape[2] :]
        most = 2 * int(self.longest.max()) + 16
        said, said_at = torch.cat([self.said, queries], 2), torch.cat([self.said_at, at], 1)
        if at.numel() > 1:  # padding must not push a row's own queries out
            said, said_at = _closed_up(said, said_at)
        self.said, self.said_at = said[:, :, -most:].clone(), said_at[:, -most:].clone()

    def crop(self, tokens: int, real: torch.Tensor | None = None) -> None:
        """The last columns are gone from what was noted, `real` of them tokens of a row."""
        self.log_at, self.log_ends = (x[:, : max(0, x.shape[1] - tokens)] for x in (self.log_at, self.log_ends))
        if real is None:
            real = torch.full((len(self.said_at),), tokens)
        # Newest last, and no padding behind a token.
        behind = torch.arange(self.said_at.shape[1], 0, -1, device=self.said_at.device)
        gone = behind <= real.to(behind.device)[:, None]
        self.said, self.said_at = _closed_up(self.said, self.said_at.masked_fill(gone, -1))

    def edge(self, before: torch.Tensor) -> torch.Tensor:
        """Behind the last sentence that ends before the position."""
        cuts = self._cuts()
        behind = torch.where(cuts & (self.log_at < before.to(cuts.device)[:, None]), self.log_at + 1, 0)
        return torch.maximum(behind.amax(1), self.begun).cpu() if behind.shape[1] else self.begun.cpu()

    def build(self, keys: torch.Tensor, positions: torch.Tensor, device: torch.device) -> None:
        """Buckets of the sentences that were noted."""
        self.length = 0
        self.bucket = torch.empty(*positions.shape[:2], 0, dtype=torch.int64, device=device)
        self.size = self.bucket.clone()
        self.mean = keys.new_empty((*keys.shape[:2], 0, keys.shape[3]), device=device)
        self.update(keys, positions)

    def update(self, keys: torch.Tensor, positions: torch.Tensor) -> None:
        """Buckets of the new tokens, behind those there are; what was noted of them is let go of."""
        new = positions[:, :, self.length :].to(self.bucket.device)
        cuts = self._cuts()
        # A padding column repeats the position before it, so that all are in order; it is never the first to be found.
        at = self.log_at.cummax(1).values.long()
        column = torch.searchsorted(at.contiguous(), new.flatten(1).long()).clamp(max=max(0, at.shape[1] - 1))
        sentence = (cuts.cumsum(1) - cuts.long()).gather(1, column).view(new.shape)
        self._add(keys[:, :, self.length :], sentence.masked_fill(new < 0, -1))
        self.length = keys.shape[2]
        moved = new.flatten(1).amax(1).long() + 1
        self.begun = torch.maximum(self.begun, moved)
        waiting = (self.log_at >= self.begun[:, None]).any(0).nonzero()
        first = int(waiting[0]) if len(waiting) else self.log_at.shape[1]
        # Copies: a view would keep the whole prompt's notes alive.
        self.log_at, self.log_ends = self.log_at[:, first:].clone(), self.log_ends[:, first:].clone()

    def keep(self, index: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, device: torch.device) -> None:
        """Sentences are what is left of them."""
        index = index.to(device)
        old = self.bucket.gather(-1, index.clamp(min=0)).masked_fill(index < 0, -1)
        self.bucket, self.size, self.mean = self.bucket[..., :0], self.size[..., :0], self.mean[:, :, :0]
        self._add(keys, old)
        self.length = keys.shape[2]

    def score(self, q: torch.Tensor) -> torch.Tensor:
        """Products with the mean query of the sentence so far, this one included."""
        own = grouped(q, self.mean.shape[1]).mean(2)
        begin = torch.where(self._cuts(), self.log_at + 1, 0).amax(1) if self.log_at.shape[1] else self.begun
        begin = torch.maximum(begin, self.begun)
        part = (self.said_at >= begin[:, None]) & (self.said_at >= 0)
        said = self.said.float().masked_fill(~part[:, None, :, None], 0).sum(2)
        query = (said + own) / (part.sum(1) + 1)[:, None, None]
        return (self.mean.float() @ query[..., None])[..., 0]

    def host_tensors(self) -> dict[str, torch.Tensor]:
        """The rows' limits."""
        return {"longest": self.longest}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Retriever:
        """As it was; a list of ids is a tuple again."""
        return super().from_state(state | {"ends": tuple(state["ends"])})

    def _summaries(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in ("mean", "log_at", "log_ends", "said", "said_at", "begun")}

    def _cuts(self) -> torch.Tensor:
        """Behind which noted columns a sentence ends, bool [batch, columns]."""
        real = self.log_at >= 0
        ends = self.log_ends & real
        rank = real.cumsum(1) - 1
        # Where its sentence begins: behind the last end, by the rank among real tokens.
        begin = torch.where(ends, rank + 1, 0).cummax(1).values if ends.shape[1] else rank
        begin = F.pad(begin, (1, 0))[:, :-1]
        # Rows move at different times: one may have columns left of sentences that are stored here.
        waiting = self.log_at >= self.begun[:, None]
        stored = (real & ~waiting).sum(1, keepdim=True)
        begin = torch.where(waiting, torch.maximum(begin, stored), begin)
        longest = self.longest.to(rank.device)[:, None]
        return real & (ends | ((rank - begin + 1) % longest == 0))

    def _add(self, keys: torch.Tensor, sentence: torch.Tensor) -> None:
        """New slots [batch, kv_heads, f, ..] with the sentence of each, ascending in a head, -1 = hole: every sentence
        of which a head has a token becomes a bucket of that head."""
        device, known = sentence.device, (self.size > 0).sum(-1, keepdim=True)
        real = sentence >= 0
        # Holes may lie between tokens: the last real sentence before a slot, not its neighbour's.
        before = F.pad(sentence.cummax(-1).values, (1, 0), value=-1)[..., :-1]
        bucket = (known + (real & (sentence != before)).cumsum(-1) - 1).masked_fill(~real, -1)
        count = max(self.size.shape[-1], int(bucket.max()) + 1 if bucket.numel() else 0)
        more = count - self.size.shape[-1]
        size = F.pad(self.size, (0, more)).scatter_add(-1, bucket.clamp(min=0), real.long())
        # In fp32 where the keys lie, so that only the means travel.
        home = keys.device
        into = bucket.clamp(min=0).to(home)[..., None].expand(*bucket.shape, keys.shape[3])
        total = keys.new_zeros((*keys.shape[:2], count, keys.shape[3]), dtype=torch.float32)
        total.scatter_add_(2, into, keys.float().masked_fill(~real.to(home)[..., None], 0))
        mean = (total / size.clamp(min=1).to(home)[..., None]).to(keys.dtype).to(device)
        kept = self.size > 0
        self.mean = torch.where(F.pad(kept, (0, more))[..., None], F.pad(self.mean, (0, 0, 0, more)), mean)
        self.bucket, self.size = torch.cat([self.bucket, bucket], -1), size


def _closed_up(said: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of [batch, kv_heads, u, head_dim] and int32 [batch, u] with padding (-1) first, the rest in order."""
    order = (at >= 0).sort(dim=1, stable=True).indices
    return said.gather(2, order[:, None, :, None].expand(said.shape)), at.gather(1, order)


@cache
def _ids_on(ends: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(ends, dtype=torch.int64, device=device)


def _is_end(ids: torch.Tensor, ends: tuple[int, ...]) -> torch.Tensor:
    return torch.isin(ids, _ids_on(ends, ids.device))
