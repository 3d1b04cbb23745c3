"""Where the screenshots are in a prompt: half-open token spans, read from the ids after placeholder expansion (gui-kv,
2.6).

Never derived from the length of texts: every run of the image placeholder is measured and checked against the grids
that the image processor reported. Columns count from the left of the padded row, so left padding needs no
correction.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

Span = tuple[int, int]


def find_spans(
    input_ids: torch.Tensor, grids: torch.Tensor, image_token_id: int, merge_size: int = 2
) -> list[list[Span]]:
    """Spans [start, end) of every screenshot, per row, in the order of the prompt.

    input_ids: [batch, columns]. grids: `image_grid_thw` [images, 3] in patches, all rows' images one after another.
    Runs that touch are split by the sizes of the grids. Raises ValueError when runs and grids do not fit each other.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; give [batch, columns]")
    sizes = iter([int(t) * int(h) * int(w) // merge_size**2 for t, h, w in grids.tolist()])
    spans = [
        [span for run in runs(row == image_token_id) for span in _split(run, sizes, number)]
        for number, row in enumerate(input_ids)
    ]
    left = sum(1 for _ in sizes)
    if left:
        raise ValueError(
            f"{left} of {len(grids)} grids have no placeholders in the prompt; was it cut or not expanded?"
        )
    return spans


def runs(inside: torch.Tensor) -> list[Span]:
    """Maximal runs of True in a bool vector [n], as [start, end)."""
    edge = torch.diff(
        inside.to(torch.int8), prepend=inside.new_zeros(1).to(torch.int8), append=inside.new_zeros(1).to(torch.int8)
    )
    starts, ends = (edge == 1).nonzero().flatten().tolist(), (edge == -1).nonzero().flatten().tolist()
    return list(zip(starts, ends, strict=True))


def _split(run: Span, sizes: Iterator[int], row: int) -> Iterator[Span]:
    """Cut one run into frames of the next sizes; it must come out even."""
    start, end = run
    while start < end:
        size = next(sizes, None)
        if size is None:
            raise ValueError(f"row {row} has placeholders at [{start}, {end}) but no grid is left for them")
        if size < 1 or start + size > end:
            raise ValueError(
                f"row {row}: placeholders [{start}, {end}) are {end - start} tokens, their grid makes {size}"
            )
        yield start, start + size
        start += size
