"""Many conversations on one device, played through by formula: which are found in memory, which on disk.

No model runs. Conversations take their steps in random order; what does not fit into memory goes to disk and then away,
the one that was used longest ago first, as on the shelf of a server. It says where a turn finds what was read before,
how many tokens are read, and with measured rates how many seconds of the model that is. It knows no queue: how long a
client waits is not in it.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Turns:
    """What each step of a conversation is: `seen` tokens after it, and `bytes` held then."""

    seen: Sequence[int]
    bytes: Sequence[int]


@dataclass(frozen=True)
class Rates:
    """Measured on the machine in question: tokens read a second, tokens written a second, bytes loaded a second.

    Raises:
        ValueError: one that is not more than 0.
    """

    read: float
    write: float
    load: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"rate of {name} is {value}; give what was measured, more than 0")


@dataclass
class Played:
    """Steps by where they found what was read before ("new" = the first of a conversation), tokens, and bytes loaded.

    `prefill_tokens_full` is what they would have read if nothing were kept; `peak_bytes` what memory held at most
    between steps.
    """

    conversations: int
    steps: int = 0
    new: int = 0
    memory: int = 0
    disk: int = 0
    lost: int = 0
    prefill_tokens: int = 0
    prefill_tokens_full: int = 0
    bytes_loaded: int = 0
    peak_bytes: int = 0

    def row(self) -> dict[str, float]:
        """Flat figures; shares are of the steps that had something to find."""
        later = max(1, self.steps - self.new)
        return {
            "conversations": self.conversations, "steps": self.steps, "found_memory": self.memory / later,
            "found_disk": self.disk / later, "read_again": self.lost / later, "prefill_tokens": self.prefill_tokens,
            "prefill_tokens_full": self.prefill_tokens_full, "kv_bytes_peak": self.peak_bytes,
        }  # fmt: skip

    def seconds(self, rates: Rates, answer: int, full: bool = False) -> float:
        """Seconds of the model for all steps with answers of `answer` tokens; `full`: if nothing were kept."""
        read = self.prefill_tokens_full if full else self.prefill_tokens
        load = 0 if full else self.bytes_loaded
        return read / rates.read + self.steps * answer / rates.write + load / rates.load


def order_of(conversations: int, steps: int, seed: int = 0) -> list[int]:
    """Who acts when: each number `steps` times, in random order."""
    order = [number for number in range(conversations) for _ in range(steps)]
    random.Random(seed).shuffle(order)
    return order


def play(turns: Turns, order: Sequence[int], memory: int, disk: int = 0) -> Played:
    """Plays all steps of `order`, numbers of conversations, with room for so many bytes in memory and on disk."""
    played, at = Played(len(set(order))), {}
    near, far = _Tier(memory), _Tier(disk)
    for number in order:
        step = at.get(number, 0)
        before, seen = (turns.seen[step - 1] if step else 0), turns.seen[step]
        known = before
        if not step:
            played.new += 1
        elif near.take(number):
            played.memory += 1
        elif (held := far.take(number)) is not None:
            played.disk += 1
            played.bytes_loaded += held
        else:
            played.lost += 1
            known = 0
        played.steps += 1
        played.prefill_tokens += seen - known
        played.prefill_tokens_full += seen
        for gone, held in near.put(number, turns.bytes[step]):
            far.put(gone, held)
        played.peak_bytes = max(played.peak_bytes, near.used)
        at[number] = step + 1
    return played


class _Tier:
    """Room for so many bytes; who was put in first leaves first."""

    def __init__(self, room: int) -> None:
        self.room, self.used = room, 0
        self._held: OrderedDict[int, int] = OrderedDict()

    def take(self, number: int) -> int | None:
        """Takes one out, its bytes; None if it is not here."""
        held = self._held.pop(number, None)
        self.used -= held or 0
        return held

    def put(self, number: int, size: int) -> list[tuple[int, int]]:
        """Puts one in; who had to leave, with their bytes."""
        self._held[number] = size
        self.used += size
        gone = []
        while self.used > self.room:
            gone.append(self._held.popitem(last=False))
            self.used -= gone[-1][1]
        return gone
