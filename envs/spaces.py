"""Gymnasium spaces for goals (any text) and for typed actions."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
from gymnasium import spaces

from .actions import Action, Drag, Hotkey, KeyDown, KeyUp, Pointing, Scroll, Type, Wait

MAX_GOAL = 10_000
_KEYS = ("Enter", "Tab", "Escape", "Backspace", "ArrowDown", "ArrowUp", "ArrowLeft", "ArrowRight")
_DIRECTIONS = ("up", "down", "left", "right")


class GoalSpace(spaces.Text):
    """Text up to 10,000 characters of any alphabet (gymnasium's own space needs a finite one); samples ASCII."""

    def __init__(self, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(max_length=MAX_GOAL, min_length=0, seed=seed)

    def contains(self, x: Any) -> bool:
        """Whether x is a string of at most MAX_GOAL characters."""
        return isinstance(x, str) and len(x) <= MAX_GOAL

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """Twenty letters and spaces; masks are ignored."""
        return "".join(self.np_random.choice(list("abcdefgh "), size=20))


class ActionSpace(spaces.Space[Action]):
    """Every typed action, with points inside a viewport of `size` = (width, height) CSS pixels.

    `sample` draws the kind uniformly, then its values. It never draws `Finished` or `CallUser`, which end the episode,
    `PressBack`, which leaves the page, or the buttons of a phone that no page has.
    """

    def __init__(self, size: tuple[int, int], seed: int | np.random.Generator | None = None) -> None:
        super().__init__(shape=None, dtype=None, seed=seed)
        self.size = size

    @property
    def is_np_flattenable(self) -> bool:
        """Never: actions are objects."""
        return False

    def contains(self, x: Any) -> bool:
        """True for a typed action, whatever its values: the environment answers bad values with an error text."""
        return isinstance(x, get_args(Action))

    def _point(self) -> tuple[float, float]:
        width, height = self.size
        return round(float(self.np_random.uniform(0, width)), 1), round(float(self.np_random.uniform(0, height)), 1)

    def sample(self, mask: Any = None, probability: Any = None) -> Action:
        """Any kind of action with equal chance, at random places; masks are ignored."""
        rng = self.np_random
        pointing = get_args(Pointing)
        kind = int(rng.integers(len(pointing) + 7)) - len(pointing)
        if kind < 0:
            return pointing[kind](*self._point())
        if kind == 0:
            return Drag(*self._point(), *self._point())
        if kind == 1:
            return Scroll(*self._point(), str(rng.choice(_DIRECTIONS)), float(rng.integers(10, 200)))  # type: ignore[arg-type]
        if kind == 2:
            return Type("".join(rng.choice(list("abcdefghij0123456789"), size=int(rng.integers(1, 6)))))
        if kind == 6:
            return Wait(0.0)
        key = str(rng.choice(_KEYS))
        return (Hotkey((key,)), KeyDown(key), KeyUp(key))[kind - 3]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActionSpace) and other.size == self.size

    def __repr__(self) -> str:
        return f"ActionSpace({self.size})"
