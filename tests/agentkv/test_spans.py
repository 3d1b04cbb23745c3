"""Spans of screenshots: runs of the placeholder, checked against the grids, per row, with any padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentkv.spans import find_spans

IMAGE, PAD, TEXT = 9, 0, 1


def row(*parts: int) -> list[int]:
    """Positive = that many placeholders, negative = that many text tokens."""
    return [token for part in parts for token in [IMAGE if part > 0 else TEXT] * abs(part)]


def grids(*sizes: tuple[int, int]) -> torch.Tensor:
    return torch.tensor([[1, h, w] for h, w in sizes]).reshape(-1, 3)


def test_two_frames() -> None:
    ids = torch.tensor([row(-3, 6, -2, 4, -5)])
    assert find_spans(ids, grids((4, 6), (4, 4)), IMAGE) == [[(3, 9), (11, 15)]]


def test_no_frame() -> None:
    assert find_spans(torch.tensor([row(-4)]), grids(), IMAGE) == [[]]


def test_touching_runs_are_split_by_the_grids() -> None:
    ids = torch.tensor([row(-1, 10, -1)])
    assert find_spans(ids, grids((4, 6), (4, 4)), IMAGE) == [[(1, 7), (7, 11)]]


def test_rows_with_left_padding() -> None:
    first, second = row(-2, 4, -1), row(-2, 6, -1, 4, -3)
    pad = [PAD] * (len(second) - len(first))
    ids = torch.tensor([pad + first, second])
    assert find_spans(ids, grids((4, 4), (4, 6), (4, 4)), IMAGE) == [[(11, 15)], [(2, 8), (9, 13)]]


def test_whole_row_is_one_frame() -> None:
    assert find_spans(torch.tensor([row(4)]), grids((2, 8)), IMAGE) == [[(0, 4)]]


def test_merge_size() -> None:
    assert find_spans(torch.tensor([row(-1, 9)]), grids((9, 9)), IMAGE, merge_size=3) == [[(1, 10)]]


@pytest.mark.parametrize(
    ("parts", "sizes", "message"),
    [
        ((-1, 5, -1), ((4, 4),), "no grid is left"),
        ((-1, 3, -1), ((4, 4),), r"placeholders \[1, 4\) are 3 tokens, their grid makes 4"),
        ((-1, 4, -1), ((4, 4), (4, 4)), "1 of 2 grids have no placeholders"),
        ((-1, 4, -1, 4), ((4, 4),), "no grid is left"),
    ],
)
def test_misfits_raise(parts: tuple[int, ...], sizes: tuple[tuple[int, int], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_spans(torch.tensor([row(*parts)]), grids(*sizes), IMAGE)


def test_shape_is_checked() -> None:
    with pytest.raises(ValueError, match="give \\[batch, columns\\]"):
        find_spans(torch.tensor(row(-1)), grids(), IMAGE)


@given(
    frames=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 4)), max_size=6),
    pad=st.integers(0, 5),
)
def test_spans_are_where_they_were_put(frames: list[tuple[int, int, int]], pad: int) -> None:
    ids, expected = [PAD] * pad, []
    for gap, h, w in frames:
        ids += [TEXT] * gap
        expected.append((len(ids), len(ids) + h * w))
        ids += [IMAGE] * (h * w)
    ids.append(TEXT)
    sizes = grids(*[(2 * h, 2 * w) for _, h, w in frames])
    assert find_spans(torch.tensor([ids]), sizes, IMAGE) == [expected]
