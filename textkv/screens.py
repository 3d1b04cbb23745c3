"""Screenshots in a conversation: where their tokens lie, how these are laid out, and what the model made of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Span = tuple[int, int]
"""Half-open [start, end) logical positions of one screenshot."""
Grid = tuple[int, int]
"""(rows, columns) in which a screenshot's tokens lie, row by row: patches after the vision tower has merged them."""
Spans = list[list[Span]]
"""Per row, the spans of its screenshots, oldest first."""
Grids = list[list[Grid]]
"""Per row, the grids of its screenshots, in the order of their spans."""


def inside(positions: torch.Tensor, spans: list[Span]) -> torch.Tensor:
    """Which positions, int of any shape, lie in any of the spans: bool of the same shape."""
    found = torch.zeros_like(positions, dtype=torch.bool)
    for start, end in spans:
        found |= (positions >= start) & (positions < end)
    return found


def logical(spans: Spans, columns: int, attention_mask: torch.Tensor | None) -> Spans:
    """Columns of a prompt padded on the left -> logical positions of each row, which count tokens only.

    Args:
        columns: of the prompt, 0 = not known.
        attention_mask: [batch, columns], 0 at padding; None = there is none.

    Raises:
        ValueError: a span that is empty, out of range, or begins before the one before it ends.
    """
    pads = [0] * len(spans) if attention_mask is None else (attention_mask == 0).sum(1).tolist()
    found: Spans = []
    for row, (of_row, pad) in enumerate(zip(spans, pads, strict=True)):
        end = 0
        for start, stop in of_row:
            if not end <= start < stop or (columns and stop > columns):
                raise ValueError(
                    f"spans of row {row}: ({start}, {stop}) must lie in [0, {columns}), not be empty, and follow the "
                    f"one before it, which ends at {end}"
                )
            end = stop
        found.append([(start - pad, stop - pad) for start, stop in of_row])
    return found


def by_span(spans: Spans, grids: Grids | None) -> list[dict[Span, Grid]]:
    """Each row's grids under their spans; no rows where no grids were given.

    Raises:
        ValueError: not one grid for each span, or a grid of another number of tokens.
    """
    if grids is None:
        return []
    if [len(row) for row in grids] != [len(row) for row in spans]:
        raise ValueError(
            f"grids for {[len(row) for row in grids]} screenshots and spans for {[len(row) for row in spans]}: give "
            "one grid (rows, columns) for each span, row by row of the batch"
        )
    for row, (of_row, shapes) in enumerate(zip(spans, grids, strict=True)):
        for (start, end), (high, wide) in zip(of_row, shapes, strict=True):
            if high * wide != end - start:
                raise ValueError(
                    f"grids of row {row}: {high} x {wide} is not the {end - start} tokens of its span; give the grid "
                    "of merged patches, image_grid_thw over the merge size"
                )
    return [dict(zip(of_row, map(tuple, shapes), strict=True)) for of_row, shapes in zip(spans, grids, strict=True)]


@dataclass(frozen=True)
class ScreenStates:
    """Hidden states of those tokens of a prompt block that lie in screenshots.

    Attributes:
        states: [batch, v, hidden_size], in the model's dtype.
        positions: int32 [batch, v], their logical positions; -1 = none of this row's.
    """

    states: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, hidden: torch.Tensor, positions: torch.Tensor, spans: Spans) -> ScreenStates:
        """Picked from hidden states [batch, m, hidden_size] of tokens at positions int32 [batch, m] (-1 = padding)."""
        rows = [inside(at, of_row) for at, of_row in zip(positions, spans, strict=True)] if spans else []
        seen = torch.stack(rows) if rows else torch.zeros_like(positions, dtype=torch.bool)
        columns = seen.any(0).nonzero()[:, 0]
        return cls(hidden[:, columns], positions[:, columns].masked_fill(~seen[:, columns], -1))

    @classmethod
    def joined(cls, chunks: list[ScreenStates]) -> ScreenStates:
        """Those of several chunks of one block."""
        return cls(torch.cat([x.states for x in chunks], 1), torch.cat([x.positions for x in chunks], 1))

    def before(self, ends: torch.Tensor) -> ScreenStates:
        """Without the tokens at positions from `ends`, int [batch], on: they were taken back."""
        return ScreenStates(self.states, self.positions.masked_fill(self.positions >= ends[:, None], -1))

    def row(self, row: int) -> ScreenStates:
        """Those of one row, [1, k, hidden_size], without holes."""
        real = self.positions[row] >= 0
        return ScreenStates(self.states[row : row + 1, real], self.positions[row : row + 1, real])
