"""How many tokens a method may keep: one `Budget` type, as a share of the tokens seen or as a number of tokens.

A budget counts everything that a layer keeps per KV head, the protected window and sinks included. Numbers without a
unit are always shares: `40` is refused, because it could mean 40 % or 40 tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


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
            text = value.strip()
            try:
                if text.endswith("t"):
                    return cls(tokens=int(text[:-1]))
                value = float(text)
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
        return f"{self.tokens}t" if self.tokens is not None else f"{self.fraction:g}"


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
