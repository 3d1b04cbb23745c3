"""Every space of coordinates against CSS pixels: odd viewports, device scales, any size that a processor makes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkv.envs.actions import Click
from agentkv.grammars import opencua, tool_call, ui_tars
from agentkv.grammars.base import CoordinateSpace, Frame, ParseError, Reject

sizes = st.tuples(st.integers(1, 4000), st.integers(1, 4000))
shares = st.tuples(st.floats(0, 1), st.floats(0, 1))
spaces = st.sampled_from(CoordinateSpace)


def resized(width: int, height: int, scale: float) -> tuple[int, int]:
    """What a processor with patches of 28 makes of a screenshot at `scale` device pixels to the CSS pixel."""
    return tuple(max(28, round(side * scale / 28) * 28) for side in (width, height))  # type: ignore[return-value]


def spot(frame: Frame, share: tuple[float, float]) -> tuple[float, float]:
    """A point in the frame's own numbers."""
    if frame.space is CoordinateSpace.SHARE:
        return min(round(share[0], 4), 0.9999), min(round(share[1], 4), 0.9999)
    width, height = frame.extent
    return min(int(share[0] * width), width - 1), min(int(share[1] * height), height - 1)


@settings(max_examples=200, deadline=None)
@given(css=sizes, made=sizes, space=spaces, share=shares)
def test_the_models_numbers_survive_css(
    css: tuple[int, int], made: tuple[int, int], space: CoordinateSpace, share: tuple[float, float]
) -> None:
    frame = Frame(css, made, space=space)
    x, y = frame.to_css(*spot(frame, share))
    assert frame.from_css(x, y) == spot(frame, share)
    assert 0 <= x < css[0] and 0 <= y < css[1]


@settings(max_examples=40, deadline=None)
@given(share=shares, space=spaces)
@pytest.mark.parametrize("scale", [1, 1.5, 2, 4])
@pytest.mark.parametrize("css", [(160, 210), (1280, 720), (333, 517), (1366, 768), (21, 4001)])
def test_css_comes_back_within_a_step_of_the_space(
    css: tuple[int, int], scale: float, share: tuple[float, float], space: CoordinateSpace
) -> None:
    frame = Frame(css, resized(*css, scale), space=space)
    point = share[0] * css[0], share[1] * css[1]
    back = frame.to_css(*frame.from_css(*point))
    for axis in (0, 1):
        step = css[axis] / (10_000 if space is CoordinateSpace.SHARE else frame.extent[axis])
        assert abs(back[axis] - point[axis]) <= step + 1e-9  # half a step, a whole one at the far edge
    for grammar in (ui_tars, opencua, tool_call):
        assert grammar.parse(grammar.render(Click(*point), frame), frame) == Click(*back)


def test_a_little_outside_moves_to_the_edge() -> None:
    flags: set[str] = set()
    for space, edge, last in (
        (CoordinateSpace.RESIZED, 282, 279),
        (CoordinateSpace.PER_MILLE, 1000, 999),
        (CoordinateSpace.SHARE, 1.01, 0.9999),
    ):
        frame = Frame((280, 280), (280, 280), space=space)
        flags.clear()
        assert frame.clamped(edge, 0, 0, flags) == frame.to_css(last, 0) and flags == {"clamped"}
        with pytest.raises(Reject, match="is outside the image of"):
            frame.clamped(edge * 1.1, 0, 0, flags)


@given(value=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_only_finite_points_are_rendered(value: float) -> None:
    frame = Frame((160, 210), (168, 224))
    for grammar in (ui_tars, opencua, tool_call):
        with pytest.raises(ValueError, match="is not a point; give two finite numbers"):
            grammar.render(Click(value, 1), frame)


def test_frame_needs_sizes() -> None:
    with pytest.raises(ValueError, match="css=.* is not a size in pixels"):
        Frame((0, 210), (168, 224))


def test_an_error_is_a_value() -> None:
    assert ParseError("why") == ParseError("why", 0)
