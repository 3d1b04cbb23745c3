"""One forward of a model, as all of its layers see it.

Our mask function makes a `Call` in place of a mask tensor; the model carries it to every layer of a kind. What follows
from the caller's mask alone is worked out at the first layer that asks, and once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_TILE = 1 << 22  # mask entries looked at together


@dataclass(frozen=True)
class Tokens:
    """What a forward brings.

    Attributes:
        positions: int32 [batch, m] logical positions, -1 = padding.
        padded: whether any is padding.
        seen: int64 [batch] on the CPU, real tokens of each row with these.
        came: int64 [batch] on the CPU, those that came; None = m in every row.
        hidden: bool [batch, p] at logical positions that this forward may not see, or None.
        real: bool [batch, columns], which columns so far were tokens; None = all.
        visible: bool [batch or 1, m, m], which new token sees which; None = each sees those before it.
    """

    positions: torch.Tensor
    padded: bool
    seen: torch.Tensor
    came: torch.Tensor | None
    hidden: torch.Tensor | None
    real: torch.Tensor | None
    visible: torch.Tensor | None


class Call:
    """A forward of `tokens` new columns after `past` others.

    Args:
        mask: bool [batch, past + tokens], False = may not be seen; None = all may.
        tokens, past: columns.
        function: transformers' mask function (batch, head, query column, key column) -> may see, if it is more than
            causality; None = it is not.
        last: only the last so many tokens are queries; None = all.
        local: whether the model's mask knows the window of its layers. One that does not (Moshi) sees all that its
            cache still holds.
    """

    ndim = 4
    """As a mask that was made already: the model around a decoder makes it, and the decoder asks once more."""

    def __init__(
        self,
        mask: torch.Tensor | None,
        tokens: int,
        past: int,
        function: Callable | None,
        last: int | None = None,
        local: bool = True,
    ) -> None:
        self.mask, self.tokens, self.past, self.function, self.last = mask, tokens, past, function, last
        self.local = local
        self._known: Tokens | None = None
        self._given: tuple[torch.Tensor, torch.Tensor] | None = None
        self._rows: list[Call] = []

    @classmethod
    def of_mask(cls, mask: torch.Tensor, past: int) -> Call:
        """The call that a mask of the caller's own means.

        Args:
            mask: bool, or additive floats, [batch, 1, m, past + m]: what each query may see.

        Raises:
            ValueError: another shape, or queries that see different tokens of what is stored already.
        """
        if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] < past + mask.shape[2]:
            raise ValueError(
                f"attention mask of shape {tuple(mask.shape)} after {past} tokens: give the 2-D padding mask "
                "[batch, tokens], or one mask for all heads [batch, 1, new tokens, tokens]"
            )
        check_mask_dtype(mask)
        m = mask.shape[2]
        # An additive mask hides by the dtype's least number, or by -inf; half of it is far from any bias.
        shown = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[:, 0]
        old, new = shown[..., :past], shown[..., past : past + m]
        # Segments read what is stored once for all queries, without an edge in it.
        if bool((old != old[:, :1]).any()):
            raise ValueError(
                "the attention mask lets the new tokens see different tokens of those that are stored: this cache can "
                "hide a stored token from all of them or from none"
            )
        call = cls(None, m, past, None)
        call._given = ~old[:, 0], new
        return call

    def __getitem__(self, index: tuple) -> Call:
        """As a mask [batch, 1, queries, keys] is cut down to its last queries by models whose last layers need no
        others."""
        rows = index[2] if isinstance(index, tuple) and len(index) > 2 else slice(None)
        last = None if rows.start is None else -rows.start
        part = Call(self.mask, self.tokens, self.past, self.function, last, self.local)
        part._known = self._known
        return part

    def of_rows(self, sizes: Sequence[tuple[int, int]]) -> list[Call]:
        """The calls that this one is of several caches, from their new and past columns; the same for all layers.

        Raises:
            ValueError: the model hides more than what comes later, by columns that are not those of each cache.
        """
        if self.function is not None or self.mask is not None:
            raise ValueError("a mask beside several caches in one forward: read them one by one")
        if not self._rows:
            self._rows = [Call(None, tokens, past, None, local=self.local) for tokens, past in sizes]
        return self._rows

    def brings(self, seen: torch.Tensor, real: torch.Tensor | None, device: torch.device) -> Tokens:
        """What comes, for rows that have `seen` int64 [batch] (CPU) real tokens and the columns `real` (see `Tokens`).

        Raises:
            ValueError: a mask of another width or for other rows, or a row whose new tokens end in padding.
        """
        if self._known is None:
            self._known = self._work_out(seen, real, device)
        known = self._known
        return known if known.positions.device == device else _moved(known, device)

    def _work_out(self, seen: torch.Tensor, real: torch.Tensor | None, device: torch.device) -> Tokens:
        batch, m = len(seen), self.tokens
        rows = seen.tolist()
        # Rows of one length are the common case: then positions are one range, made without a copy to the device.
        if len(set(rows)) == 1:
            positions = torch.arange(rows[0], rows[0] + m, dtype=torch.int32, device=device).expand(batch, m)
        else:
            positions = seen.to(device)[:, None] + torch.arange(m, device=device)
        hidden, came, columns, padded = None, None, real, False
        if self.mask is not None:
            mask = self.mask.to(device)
            if mask.dim() != 2 or len(mask) != batch:
                raise ValueError(
                    f"attention_mask of shape {tuple(mask.shape)} for {batch} rows: give [batch, columns of the whole "
                    "conversation]"
                )
            if mask.shape[1] < self.past + m:
                raise ValueError(
                    f"attention_mask has {mask.shape[1]} columns, the cache has seen {self.past} and {m} come: give "
                    "the mask of the whole conversation"
                )
            # The mask covers the whole conversation: columns seen before may be hidden now, and new ones may be
            # padding.
            old, new = mask[:, : self.past], mask[:, self.past : self.past + m]
            # Padding of earlier turns is no token: it is stored nowhere, and so nothing to hide.
            gone = ~old if real is None else real & ~old
            # The one question to the device in a forward with a mask.
            padded, hides = torch.stack([~new.all(), gone.any()]).tolist()
            if hides:
                hidden = _by_position(gone, real)
            if padded:
                # Tokens are counted without padding, so that a row is numbered as if it were alone.
                positions = (positions[:, :1] + new.long().cumsum(1) - 1).masked_fill(~new, -1)
                came = new.sum(1).cpu()
                if m > 1 and not bool((new[:, -1] | ~new.any(1)).all()):
                    raise ValueError(
                        "the batch is padded on the right: pad on the left (tokenizer.padding_side = 'left')"
                    )
            if padded or real is not None:
                before = torch.ones_like(old) if real is None else real
                columns = torch.cat([before, new], 1)
        elif real is not None:
            columns = torch.cat([real, real.new_ones(batch, m)], 1)
        visible = None if self.function is None or m == 1 else _deviations(self.function, batch, self.past, m, device)
        if self._given is not None:
            gone, visible = (x.to(device) for x in self._given)
            hidden = _by_position(gone, real) if bool(gone.any()) else None
            # A query that sees nothing new sees itself, so that its row is not empty.
            visible = visible | torch.eye(m, dtype=torch.bool, device=device)
        return Tokens(
            positions.to(torch.int32), padded, seen + (m if came is None else came), came, hidden, columns, visible
        )


def _by_position(gone: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Columns bool [batch, n] -> the logical positions of the tokens that they are, counted without padding."""
    if real is None:
        return gone
    # Padding goes to a column that is cut off.
    at = (real.long().cumsum(1) - 1).masked_fill(~real, real.shape[1])
    return gone.new_zeros(len(gone), gone.shape[1] + 1).scatter(1, at, gone)[:, :-1]


def _deviations(function: Callable, batch: int, past: int, m: int, device: torch.device) -> torch.Tensor | None:
    """Which new token sees which by a mask function, bool [batch, m, m]; None if that is causality."""
    columns = torch.arange(past, past + m, device=device)
    row, head = torch.arange(batch, device=device)[:, None, None], torch.zeros((), dtype=torch.long, device=device)

    def tile(queries: torch.Tensor) -> torch.Tensor:
        seen = function(row, head, queries[None, :, None], columns[None, None])
        return torch.as_tensor(seen, device=device).expand(batch, len(queries), m)

    tiles = columns.split(max(1, _TILE // (m * batch)))
    # Compared tile by tile first: the whole square of a long prompt is made only where it is needed.
    if all(bool((tile(queries) == (columns <= queries[:, None])).all()) for queries in tiles):
        return None
    return torch.cat([tile(queries) for queries in tiles], 1)


def _moved(x: Tokens, device: torch.device) -> Tokens:
    """The same on another device."""
    parts = (None if t is None else t.to(device) for t in (x.positions, x.hidden, x.real, x.visible))
    positions, hidden, real, visible = parts
    return Tokens(positions, x.padded, x.seen, x.came, hidden, real, visible)


def check_mask_dtype(mask: torch.Tensor) -> None:
    """Raise ValueError unless a mask [batch, 1, queries, keys] is bool or additive floats."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"attention mask of shape {tuple(mask.shape)} is {mask.dtype}: give bool, True = may be seen, or floats "
            "that are added to the scores"
        )
