"""What an agent can do to a page: one frozen dataclass per action, coordinates in CSS pixels of the viewport.

Grammars (how a model family writes these as text) live with the models, not here: the environment only ever
receives these values, so nothing that a model says is executed as code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MODIFIER_KEYS = ("Control", "Shift", "Alt")
MAX_KEYS = 5  # pressed together
NAMED_KEYS = ("Enter", "Escape", "Tab", "Backspace", "Delete", "Space", "Home", "End", "PageUp", "PageDown", "Insert")
NAMED_KEYS += ("ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight", "CapsLock") + tuple(f"F{n}" for n in range(1, 13))


@dataclass(frozen=True)
class Click:
    """One left click at (x, y); here and for the other clicks x and y are both None for where the pointer is."""

    x: float | None = None
    y: float | None = None


@dataclass(frozen=True)
class DoubleClick:
    """Two left clicks at (x, y) within the double-click interval."""

    x: float | None = None
    y: float | None = None


@dataclass(frozen=True)
class RightClick:
    """One right click at (x, y)."""

    x: float | None = None
    y: float | None = None


@dataclass(frozen=True)
class MiddleClick:
    """One click of the middle button at (x, y)."""

    x: float | None = None
    y: float | None = None


@dataclass(frozen=True)
class TripleClick:
    """Three quick left clicks at (x, y): selects a line or a paragraph."""

    x: float | None = None
    y: float | None = None


@dataclass(frozen=True)
class LongPress:
    """The left button held down at (x, y) for most of a second."""

    x: float
    y: float


@dataclass(frozen=True)
class Move:
    """The pointer rests at (x, y), no button pressed: what is there sees a hover."""

    x: float
    y: float


@dataclass(frozen=True)
class Drag:
    """Press at (x, y), move, release at (to_x, to_y); x and y are both None for where the pointer is."""

    x: float | None
    y: float | None
    to_x: float
    to_y: float


@dataclass(frozen=True)
class Scroll:
    """Turn the wheel over (x, y) by `pixels` CSS pixels towards `direction`; x and y are both None for where the
    pointer is.
    """

    x: float | None
    y: float | None
    direction: Literal["up", "down", "left", "right"]
    pixels: float = 100.0


@dataclass(frozen=True)
class Type:
    """Type `text` into whatever has the focus, as on a keyboard: a newline presses Enter, a tab the Tab key."""

    text: str


@dataclass(frozen=True)
class Hotkey:
    """Press the keys together and let go, in Playwright's key names, e.g. ("Control", "a").

    Keys are one printable ASCII character, or one of `NAMED_KEYS` and `MODIFIER_KEYS`; here and below.
    """

    keys: tuple[str, ...]


@dataclass(frozen=True)
class KeyDown:
    """Press `key` and hold it, until a `KeyUp` of the same key."""

    key: str


@dataclass(frozen=True)
class KeyUp:
    """Let go of `key`."""

    key: str


@dataclass(frozen=True)
class Wait:
    """Do nothing for `seconds`."""

    seconds: float = 1.0


@dataclass(frozen=True)
class Goto:
    """Open the address `url` as if it were typed into the address bar; what the task does not allow is refused."""

    url: str


@dataclass(frozen=True)
class Reload:
    """Load the page once more, as the button beside the address bar does."""


@dataclass(frozen=True)
class Note:
    """The agent writes `text` down for itself; nothing happens to the page."""

    text: str


@dataclass(frozen=True)
class PressBack:
    """One page back in the history, as the back button of a browser or a phone."""


@dataclass(frozen=True)
class PressHome:
    """The home button of a phone: a web page has none and answers with an error."""


@dataclass(frozen=True)
class OpenApp:
    """Start the app `name` of a phone: a web page has none and answers with an error."""

    name: str


@dataclass(frozen=True)
class Finished:
    """The agent says that it is done; `answer` is its text for the user, if any, `status` its own view of its work."""

    answer: str = ""
    status: Literal["success", "failure"] = "success"


@dataclass(frozen=True)
class CallUser:
    """The agent asks a person for help, perhaps with a `question`: the episode ends without success."""

    question: str = ""


@dataclass(frozen=True)
class Several:
    """Gestures of one answer, done one after the other as one step; the first that cannot be done ends it."""

    actions: tuple[Single, ...]


Clicking = Click | DoubleClick | RightClick | MiddleClick | TripleClick
Pointing = Clicking | LongPress | Move
Phone = PressBack | PressHome | OpenApp
Browsing = Goto | Reload | Note
Single = Pointing | Drag | Scroll | Type | Hotkey | KeyDown | KeyUp | Wait | Phone | Browsing | Finished | CallUser
Action = Single | Several


def parts(action: Action) -> tuple[Single, ...]:
    """The gestures of an action, in order."""
    return action.actions if isinstance(action, Several) else (action,)


def ending(action: Action) -> Finished | CallUser | None:
    """What in an action ends the episode, if anything does."""
    return next((part for part in parts(action) if isinstance(part, Finished | CallUser)), None)
