"""What transformers does to a layer afterwards: the newest tokens are taken back, the rows of the batch rearranged."""

from __future__ import annotations

import torch

from textkv.moments import Moments


class Takeback(Moments):
    """The part of a layer that undoes and rearranges; see `textkv.layer.Layer` for its attributes."""

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` may work: a governed layer asks its method; with a window it depends on the tokens."""
        return not self.kind.governed or self.context.method.capabilities.crop

    def check_crop(self, count: int) -> None:
        """Raises ValueError unless the last `count` tokens can be taken back."""
        name = self.context.method.expression
        if count < 0:
            raise ValueError(f"crop({-count}): give the number of tokens to remove as a negative number")
        if count and not self.is_croppable:
            raise ValueError(f"crop({-count}): {name} evicts while decoding and cannot restore tokens")
        if count > self.since_eviction:
            name = name if self.kind.governed else f"layer {self.kind.number} with its window of {self.kind.window}"
            raise ValueError(
                f"crop({-count}): {name} can take back only the {self.since_eviction} tokens since it last "
                "evicted; fork the cache before the prompt instead"
            )
        if count and not self.collector.can_drop(count):
            raise ValueError(
                f"crop({-count}): {name} has counted in what these tokens attend to; take back whole forwards, or fork "
                "the cache before the prompt instead"
            )
        if count and self.is_initialized and not self.segments[-1].can_crop(count):
            raise ValueError(
                f"crop({-count}): layer {self.kind.number} sees {self.kind.window} tokens and has let go of older ones "
                "that it would see again; fork the cache before the tokens instead"
            )

    def crop(self, tokens_to_remove: int, real: torch.Tensor | None = None) -> None:
        """Takes back the last -tokens_to_remove tokens (the number is negative, as in transformers).

        Args:
            real: int64 [batch] on the CPU, how many of them were tokens of each row; None = as the cache noted.

        Raises:
            ValueError: a positive number, a method that cannot, or more tokens than came since the last eviction.
        """
        count = -int(tokens_to_remove)
        self.check_crop(count)
        if not count or not self.is_initialized:
            return
        self.context.stay_writable()
        # Padding among the columns that go: rows lose different numbers of tokens.
        real = self.context.real_in_last(count) if real is None else real
        self.segments[-1].crop(count, real)
        # Cut to the tokens that are left.
        self.statistics |= {name: self.statistic(name) for name in self._of_tokens()}
        self.seen -= count
        self.real_seen = self.real_seen - (count if real is None else real)
        self.since_eviction -= count
        self.collector.drop_last(count)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Takes rows `beam_idx` int64 [new batch] of segments, statistics and counts, a row as often as named."""
        if not self.is_initialized:
            return
        for segment in self.segments:
            segment.take_rows(beam_idx)
        for known in (self.statistics, self.trajectory):
            known |= {name: x.index_select(0, beam_idx.to(x.device)) for name, x in known.items()}
        self.real_seen = self.real_seen[beam_idx.cpu()]
        self.collector.take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Makes each row `repeats` rows that follow one another."""
        if self.is_initialized:
            self.reorder_cache(torch.arange(len(self.real_seen)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps rows by number, int64 in any order, or where bool [batch] is True."""
        if self.is_initialized and indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self.reorder_cache(indices)
