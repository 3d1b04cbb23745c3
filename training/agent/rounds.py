"""Several drawn memory episodes in a row, as tasks of many steps have them: only the newest screenshots are shown."""

from __future__ import annotations

import random
from dataclasses import replace

from training.agent.drawn_memory import colour, place
from training.agent.episodes import HISTORY_FRAMES
from training.agent.packing import Ask, Turn


def drawn_rounds(rng: random.Random) -> list[Turn]:
    """Two to twelve episodes with the same goal; the screenshots before the last few are gone, and with them all
    questions about them.
    """
    kind = rng.choice((colour, colour, place))
    turns: list[Turn] = []
    for _ in range(rng.choice((2, 3, 4, 6, 9, 12))):
        told = len(turns)
        turns += [replace(turn, asks=[_moved(ask, told) for ask in turn.asks]) for turn in kind(rng).turns]
    gone = max(0, len(turns) - rng.choice(HISTORY_FRAMES) - 1)
    shown = [
        replace(turn, image=None, asks=[])
        if step < gone
        else replace(turn, asks=[_moved(a, -gone) for a in turn.asks if all(look.screen >= gone for look in a.looks)])
        for step, turn in enumerate(turns)
    ]
    shown[-1].reply = None
    return shown


def _moved(ask: Ask, by: int) -> Ask:
    """`ask` with every screenshot that it looks at `by` screenshots further on."""
    return ask._replace(looks=tuple(look._replace(screen=look.screen + by) for look in ask.looks))
