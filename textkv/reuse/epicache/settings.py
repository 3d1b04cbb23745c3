"""How a conversation is kept: the numbers of EpiCache (arXiv 2509.17396)."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from textkv.reuse.epicache.blocks import Level


@dataclass(frozen=True)
class Settings:
    """How a conversation is kept.

    Attributes:
        budget: entries that a KV head keeps, mean over layers (M).
        block: tokens read at a time (Mb).
        episodes: topics (E), as far as there are as many different windows.
        window: turns of a window (w).
        medoids: windows that stand for an episode, as far as they fit into the probe.
        probe: most tokens of the probe (p), at most a block.
        sinks: first tokens that always stay, behind which the system's words do too.
        alpha: how much more sensitive layers get (Eq. 10), with `sensitivity`.
        floor: share of the budget that every layer has.
        sensitivity: of each layer (`budgets.sensitivities`); None = all alike.
        level: "pair", heads of a layer compete; "uniform", all alike.
        tau: cosine to the nearest episode below which new turns open one of their own; the paper gives no value.
        most_bytes: what one cache may weigh while it is read; None = no bound.

    Raises:
        ValueError: a number below its least.
    """

    budget: int = 4096
    block: int = 1024
    episodes: int = 4
    window: int = 4
    medoids: int = 8
    probe: int = 512
    sinks: int = 4
    alpha: float = 1.0
    floor: float = 0.25
    sensitivity: tuple[float, ...] | None = None
    level: Level = "pair"
    tau: float = 0.3
    most_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.sensitivity is not None:  # JSON knows no tuples
            object.__setattr__(self, "sensitivity", tuple(self.sensitivity))
        whole = {name: 1 for name in ("budget", "block", "episodes", "window", "medoids", "probe")} | {"sinks": 0}
        for name, least in whole.items():
            given = getattr(self, name)
            if not isinstance(given, int) or isinstance(given, bool) or given < least:
                raise ValueError(f"{name}={given!r}: a whole number of at least {least}")
        if not (isfinite(self.alpha) and isfinite(self.tau)):
            raise ValueError(f"alpha={self.alpha}, tau={self.tau}: both are finite numbers")
        if self.probe > self.block:
            raise ValueError(f"probe={self.probe} is longer than block={self.block}; the probe is read behind a block")
