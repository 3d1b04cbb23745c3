"""How many tokens a method may keep: one `Budget` type, as a share of the tokens seen or as a number of tokens.

A budget counts everything that a layer keeps per KV head, the protected window and sinks included. Numbers without a
unit are always shares: `40` is refused, because it could mean 40 % or 40 tokens.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from textkv.expression import number, whole


@dataclass(frozen=True)
class Budget:
    """Tokens to keep per layer and KV head: `Budget(fraction=0.4)` or `Budget(tokens=1024)`.

    Attributes:
        fraction: share of the tokens seen, in (0, 1]; 1.0 keeps everything.
        tokens: absolute number of tokens, at least 1.

    Raises:
        ValueError: both or neither given, or a value out of its range.
    """

    fraction: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.tokens is None):
            raise ValueError(
                f"budget needs either fraction or tokens, got fraction={self.fraction} and tokens={self.tokens}"
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(_not_a_fraction(self.fraction))
        if self.tokens is not None and (int(self.tokens) != self.tokens or self.tokens < 1):
            raise ValueError(f"budget of {self.tokens} tokens: give a whole number of at least 1")

    @classmethod
    def parse(cls, value: Budget | float | int | str) -> Budget:
        """Reads 0.4, "0.4" (share) or "512t" (tokens); a `Budget` passes through."""
        if isinstance(value, Budget):
            return value
        if isinstance(value, str):
            try:
                if value.endswith("t"):
                    return cls(tokens=whole(value[:-1]))
                value = number(value)
            except ValueError as error:
                if "budget" in str(error):
                    raise
                raise ValueError(f"budget={value!r} is neither a share like 0.4 nor tokens like 512t") from None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"budget={value!r} is neither a share like 0.4 nor tokens like '512t'")
        return cls(fraction=float(value))

    @property
    def is_full(self) -> bool:
        """True when nothing can ever be dropped."""
        return self.fraction == 1.0

    def count(self, seen: int) -> int:
        """Tokens to keep of `seen`: floor(fraction * seen), never less than 1, never more than were seen."""
        if self.tokens is not None:
            return min(self.tokens, seen)
        # The tiny addend undoes binary rounding: 0.29 * 100 is 28.999999999999996, and 29 was asked for.
        return min(max(1, math.floor(self.fraction * seen + 1e-9)), seen)

    def __str__(self) -> str:
        if self.tokens is not None:
            return f"{self.tokens}t"
        short = f"{self.fraction:g}"  # 1 and not 1.0, where nothing is lost
        return short if float(short) == self.fraction else repr(self.fraction)


def _not_a_fraction(value: float) -> str:
    mend = "use a share in (0, 1]"
    if 1 < value <= 100:
        mend = f"use {value / 100:g} for {value:g} %"
        if float(value).is_integer():
            mend += f', or "{int(value)}t" for {int(value)} tokens'
    elif value > 100 and float(value).is_integer():
        mend = f'use "{int(value)}t" for {int(value)} tokens'
    return f"budget={value:g} is not a fraction; {mend}"


def round_to_sum(shares: torch.Tensor, total: int) -> torch.Tensor:
    """Whole numbers, int64, near the 1-D `shares` that add up to `total`: the largest remainders are rounded up, ties
    by the lower index, so larger shares never get less. (Rounding each alone, as published code does, may overspend.)
    """
    low = shares.floor().long()
    rest = total - int(low.sum())
    low[(low - shares).sort(stable=True).indices[:rest]] += 1
    return low


def apportion(log_weights: Sequence[float], caps: Sequence[int], total: int, floor: int = 0) -> list[int]:
    """Slots for each part in proportion to exp(`log_weights`), at most `caps`: they add up to min(total, sum(caps)).

    A part's slot number s = 0, 1, .. is worth weight / (s + 1/2), and the `total` dearest slots of all parts are handed
    out (Webster's rule; ties to the lower part). This is water-filling rounded to the nearest whole number, chosen for
    one property: a part that joins later only pushes slots of others out, so no share ever grows by it.

    Args:
        log_weights: finite natural logarithms: only their differences matter, and no weight is zero.
        caps: most slots of each part.
        floor: slots that each part gets first, as far as its cap allows.

    Raises:
        ValueError: the floors alone exceed `total`.
    """
    if floor * len(caps) > total:
        raise ValueError(f"floor={floor} for {len(caps)} parts is more than the {total} slots there are; lower it")
    parts = list(zip(log_weights, caps, strict=True))
    total = min(total, sum(caps))

    def dearer(level: float) -> list[int]:
        """How many slots of each part are worth more than exp(level); the exponent is bounded against overflow."""
        return [min(cap, max(floor, math.ceil(math.exp(min(w - level, 60.0)) - 0.5))) for w, cap in parts]

    low, high = min(log_weights) - math.log(max(caps) + 1) - 1, max(log_weights) + 1
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(dearer(middle)) <= total else (middle, high)
    # The last slot of each part is given back: whether it was dear enough is decided below, without rounding errors.
    given = [max(min(floor, cap), n - 1) for n, (_, cap) in zip(dearer(high), parts, strict=True)]

    def offer(part: int) -> tuple[float, int]:
        return math.log(given[part] + 0.5) - log_weights[part], part

    waiting = [offer(part) for part, cap in enumerate(caps) if given[part] < cap]
    heapq.heapify(waiting)
    for _ in range(total - sum(given)):
        part = waiting[0][1]
        given[part] += 1
        heapq.heappop(waiting)
        if given[part] < caps[part]:
            heapq.heappush(waiting, offer(part))
    return given
