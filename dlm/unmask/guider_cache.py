"""The guider's cache of keys and values, and the rows of the batch that share it.

Rows of a batch keep drafts of different lengths, but a cache is cropped by the same number of columns in all rows. So a
guider cache of several rows crops to the longest and hides the rest of the others: those columns stay and are masked,
positions do not count them. One of a single row never has such holes. A cache kept by a method of textkv serves one
row, because a method cannot be told of holes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from dlm.unmask.guider import Guider
from textkv.cache import MethodCache


@dataclass
class Counted:
    """What the guider computed: its forwards, and the columns fed to it, times rows."""

    forwards: int = 0
    tokens: int = 0


class GuiderCache:
    """What the guider has read of its rows.

    Args:
        rows: the canvas rows that it serves.
        counted: where its forwards are counted.

    Attributes:
        columns: columns held in the cache.
    """

    def __init__(self, guide: Guider, rows: slice, device: torch.device, counted: Counted) -> None:
        self.guide, self.rows, self.counted = guide, rows, counted
        self.columns = 0
        self.size = rows.stop - rows.start
        self.real = torch.zeros(self.size, 0, dtype=torch.bool, device=device) if self.size > 1 else None
        self.cache: Cache = DynamicCache()
        if guide.method is not None:
            self.cache = MethodCache(guide.model, guide.method, guide.budget)

    def read_prompt(self, tokens: torch.Tensor) -> None:
        """Reads a prompt int64 [1, n] that the cache's method compresses; only for a cache that has one."""
        if tokens.shape[1]:
            self.forward(tokens, None, 1)
        # Any draft must be possible to take back: from here on the method leaves the cache alone.
        self.cache.freeze()

    def forward(self, tokens: torch.Tensor, real: torch.Tensor | None, keep: int) -> torch.Tensor:
        """Feeds tokens int64 [rows, c]; logits [rows, keep, V] of the last `keep` columns.

        Args:
            real: bool [rows, c], False = a column that this row does not have; not read by a cache of one row.
        """
        options = {}
        if self.real is not None:
            self.real = torch.cat([self.real, real], 1)
            # Hidden columns take no position: the row reads on as if rejected drafts had never been there.
            positions = self.real.cumsum(1)[:, -tokens.shape[1] :] - 1
            options = {"attention_mask": self.real.long(), "position_ids": positions.clamp(min=0)}
        out = self.guide.model(
            input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=keep, **options
        )
        self.columns += tokens.shape[1]
        self.counted.forwards += 1
        self.counted.tokens += tokens.numel()
        return out.logits

    def take_rows(self, rows: torch.Tensor) -> None:
        """Keeps rows int64 [kept] of those that it serves, which are the canvas's first from now on."""
        self.rows, self.size = slice(0, len(rows)), len(rows)
        if self.real is not None:
            self.real = self.real[rows.to(self.real.device)]
            if self.columns:
                self.cache.batch_select_indices(rows.to(self.real.device))

    def keep(self, counts: list[int], fed: int) -> None:
        """Of the last `fed` columns each row keeps the first `counts`."""
        most = max(counts)
        self.drop(fed - most)
        if self.real is not None and most:
            limit = torch.tensor(counts, device=self.real.device)[:, None]
            # [rows, most]: the columns behind a row's own count stay in the cache, but nobody sees them.
            self.real[:, -most:] &= torch.arange(most, device=self.real.device) < limit

    def drop(self, columns: int) -> None:
        """Takes the last columns back."""
        if not columns:
            return
        # Negative: transformers counts the columns to take away from the end.
        self.cache.crop(-columns)
        self.columns -= columns
        if self.real is not None:
            self.real = self.real[:, :-columns]
