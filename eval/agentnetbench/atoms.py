"""Atomic actions as AgentNetBench writes them, and the typed actions of our grammars as such atoms.

Points are shares of the image's sides, 0 to 1. Types are lower case without "_". Keys are pyautogui's names, brought to
one spelling on both sides (return = enter, esc = escape), because a typed action no longer knows how a model spelled
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from agentkv.envs.actions import (
    Action,
    Click,
    Clicking,
    DoubleClick,
    Drag,
    Finished,
    Hotkey,
    MiddleClick,
    Move,
    RightClick,
    Scroll,
    TripleClick,
    Type,
    Wait,
)
from agentkv.grammars.base import Reject
from agentkv.grammars.keys import key_of, word_of
from agentkv.grammars.opencua import WHEEL_CLICK

Point = tuple[float, float]
Box = tuple[float, float, float, float]
TARS, TOOL = "UI-TARS", "computer_use"
TARS_CLICKS = 5  # its scroll names no amount; its authors' client turns the wheel by so many clicks
CLICKS: dict[str, type[Clicking] | type[Move]] = {
    "click": Click,
    "doubleclick": DoubleClick,
    "rightclick": RightClick,
    "tripleclick": TripleClick,
    "middleclick": MiddleClick,
    "moveto": Move,
}
NAMES = {kind: name for name, kind in CLICKS.items()}
POINTED = (*CLICKS, "dragto")


@dataclass(frozen=True)
class Atom:
    """One atomic action, of a ground truth or predicted.

    Attributes:
        type: "click", "moveto", "dragto", "write", "press", "hotkey", "scroll", "terminate" ...
        point: (x, y); None for actions without one.
        text: of a write.
        keys: of a press or hotkey, lower case.
        amount: of a scroll, up positive; None = not said.
        direction: 1 up, -1 down, 0 unknown.
        status: of a terminate.
        boxes: (x, y, width, height) within which a ground truth's point counts as hit.
    """

    type: str
    point: Point | None = None
    text: str = ""
    keys: tuple[str, ...] = ()
    amount: float | None = None
    direction: int = 0
    status: str = ""
    boxes: tuple[Box, ...] = ()


def sign(value: float) -> int:
    """1, -1 or 0."""
    return (value > 0) - (value < 0)


def key_word(key: str, mac: bool = False) -> str:
    """One spelling per key, lower case; unknown keys as they are. On a Mac the command key is "ctrl", as in the
    recordings.
    """
    try:
        word = word_of(key_of(key, 0)).lower()
    except Reject:
        word = key.lower()
    return "ctrl" if mac and word == "win" else word


def atoms_of(actions: Iterable[Action], size: tuple[int, int], grammar: str = "", mac: bool = False) -> list[Atom]:
    """A reply's actions, their points in pixels of an image of `size` (width, height), as atoms.

    A drag or scroll from a point is a move and what follows. `grammar` (its NAME) says what a scroll counts in: UI-TARS
    names no amount, the computer_use tool gives the number that pyautogui is called with, all others turn a wheel.
    """
    return [atom for action in actions for atom in _atoms(action, size, grammar, mac)]


def _atoms(action: Action, size: tuple[int, int], grammar: str, mac: bool) -> Iterable[Atom]:
    if isinstance(action, Drag | Scroll) and action.x is not None and action.y is not None:
        yield Atom("moveto", _share(action.x, action.y, size))
    match action:
        case Drag():
            yield Atom("dragto", _share(action.to_x, action.to_y, size))
        case Scroll():
            yield _scrolled(action, grammar)
        case Type(text):
            yield Atom("write", text=text)
        case Hotkey(keys):
            words = tuple(key_word(key, mac) for key in keys)
            yield Atom("press" if len(words) == 1 else "hotkey", keys=words)
        case Finished():
            yield Atom("terminate", status=action.status)
        case _ if type(action) in NAMES:
            yield Atom(NAMES[type(action)], _share(action.x, action.y, size))
        case _:  # what no recording has: it matches nothing
            yield Atom(type(action).__name__.lower())


def _share(x: float, y: float, size: tuple[int, int]) -> Point:
    return x / size[0], y / size[1]


def _scrolled(action: Scroll, grammar: str) -> Atom:
    clicks = TARS_CLICKS if grammar == TARS else action.pixels / (1 if grammar == TOOL else WHEEL_CLICK)
    up = 1 if action.direction in ("up", "right") else -1
    kind = "scroll" if action.direction in ("up", "down") else "hscroll"
    return Atom(kind, amount=up * clicks, direction=up)


def typed(atoms: Sequence[Atom], size: tuple[int, int], grammar: str = "") -> list[Action]:
    """A recorded step as typed actions in pixels of an image of `size`: a move is taken into the drag or scroll that
    follows it, an Enter into the text before it.

    Raises ValueError for an atom that no typed action stands for.
    """
    actions: list[Action] = []
    for atom in atoms:
        action = _typed(atom, size, grammar)
        before = actions[-1] if actions else None
        if isinstance(before, Move) and isinstance(action, Drag | Scroll):
            actions[-1] = replace(action, x=before.x, y=before.y)
        elif isinstance(before, Type) and action == Hotkey(("Enter",)):
            actions[-1] = Type(before.text + "\n")
        else:
            actions.append(action)
    return actions


def _typed(atom: Atom, size: tuple[int, int], grammar: str) -> Action:
    x, y = (atom.point[0] * size[0], atom.point[1] * size[1]) if atom.point else (0.0, 0.0)
    if atom.type in CLICKS:
        return CLICKS[atom.type](x, y)
    match atom.type:
        case "dragto":
            return Drag(None, None, x, y)
        case "write":
            return Type(atom.text)
        case "press" | "hotkey":
            try:
                return Hotkey(tuple(key_of(key, 0) for key in atom.keys))
            except Reject as error:
                raise ValueError(f"a recorded key has no name of ours: {error}") from None
        case "scroll" | "hscroll":
            words = ("up", "down") if atom.type == "scroll" else ("right", "left")
            clicks = abs(atom.amount) if atom.amount is not None else TARS_CLICKS
            unit = 1 if grammar == TOOL else WHEEL_CLICK
            return Scroll(None, None, words[atom.direction < 0], clicks * unit)
        case "terminate" if atom.status in ("success", "failure"):
            return Finished(status=atom.status)  # type: ignore[arg-type]
        case "wait":
            return Wait()
    raise ValueError(f"no typed action stands for a recorded {atom.type!r}")


def as_released(atoms: Sequence[Atom]) -> list[Atom]:
    """A UI-TARS reply as GUI-KV's script reads it: a scroll or drag loses the move before it, "ctrl" is called
    "control".
    """
    kept = [
        atom
        for atom, after in zip_longest(atoms, atoms[1:])
        if not (atom.type == "moveto" and after is not None and after.type in ("scroll", "hscroll", "dragto"))
    ]
    return [replace(atom, keys=tuple("control" if key == "ctrl" else key for key in atom.keys)) for atom in kept]
