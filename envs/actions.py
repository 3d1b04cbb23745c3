"""What an agent can do to a page: one frozen dataclass per action, coordinates in CSS pixels of the viewport.

Grammars (how a model family writes these as text) live with the models, not here: the environment only ever
receives these values, so nothing that a model says is executed as code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Click:
    """One left click at (x, y)."""

    x: float
    y: float


@dataclass(frozen=True)
class DoubleClick:
    """Two left clicks at (x, y) within the double-click interval."""

    x: float
    y: float


@dataclass(frozen=True)
class RightClick:
    """One right click at (x, y)."""

    x: float
    y: float


@dataclass(frozen=True)
class Drag:
    """Press at (x, y), move, release at (to_x, to_y)."""

    x: float
    y: float
    to_x: float
    to_y: float


@dataclass(frozen=True)
class Scroll:
    """Turn the wheel over (x, y) by `pixels` CSS pixels towards `direction`."""

    x: float
    y: float
    direction: Literal["up", "down", "left", "right"]
    pixels: float = 100.0


@dataclass(frozen=True)
class Type:
    """Type `text` into whatever has the focus; a newline at the end presses Enter."""

    text: str


@dataclass(frozen=True)
class Hotkey:
    """Press the keys together, in Playwright's key names, e.g. ("Control", "a")."""

    keys: tuple[str, ...]


@dataclass(frozen=True)
class Wait:
    """Do nothing for `seconds`."""

    seconds: float = 1.0


@dataclass(frozen=True)
class Finished:
    """The agent says that the task is done; `answer` is its text for the user, if any."""

    answer: str = ""


@dataclass(frozen=True)
class CallUser:
    """The agent asks a person for help: the episode ends without success."""


Action = Click | DoubleClick | RightClick | Drag | Scroll | Type | Hotkey | Wait | Finished | CallUser
