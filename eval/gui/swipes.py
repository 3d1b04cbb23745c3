"""Scrolls and swipes: a finger moves one way, and the page shows what lies the other way."""

from __future__ import annotations

from agentkv.envs.actions import Drag, Scroll, Single

OPPOSITE = {"up": "down", "down": "up", "left": "right", "right": "left"}


def swiped(x: float, y: float, to_x: float, to_y: float) -> str:
    """The direction that a page scrolls when a finger goes from (x, y) to (to_x, to_y); "" where it rests."""
    across, down = to_x - x, to_y - y
    if across == down == 0:
        return ""
    way = ("right" if across > 0 else "left") if abs(across) > abs(down) else ("down" if down > 0 else "up")
    return OPPOSITE[way]


def direction_of(action: Single) -> str:
    """The direction that an action scrolls; "" if it does not."""
    if isinstance(action, Scroll):
        return action.direction
    if isinstance(action, Drag) and action.x is not None and action.y is not None:
        return swiped(action.x, action.y, action.to_x, action.to_y)
    return ""
