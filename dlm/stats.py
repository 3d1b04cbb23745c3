"""What a generation cost, and what it gave."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Stats:
    """What a generation cost.

    Attributes:
        forwards: of the model; with classifier-free guidance both halves run in one.
        query_tokens: slots that the model computed, summed over forwards: everything that was fed. Rows that are
            finished and padding are not fed, so this is the sum of what the rows cost alone (a model with an attention
            other than ours computes padding where nothing is cached). Doubled by classifier-free guidance; `ssd` counts
            every canvas that it verifies.
        value_tokens: rows whose values alone were computed besides (dLLM-Cache).
        guider_forwards: forwards of the guider.
        row_forwards: forwards, summed over the rows that were unfinished.
        committed: tokens that the rule committed, per row; slots filled behind an end of text are not among them.
        text_tokens: tokens before the first end of text, per row: what a throughput should count.
        seconds: wall time of the loop.
        cache_bytes: bytes that the cache held after the last forward, of the rows that were still unfinished then.
        cache_bytes_peak: the most that it held after any forward.
        extra: what the rule reports besides.
    """

    forwards: int = 0
    query_tokens: int = 0
    value_tokens: int = 0
    guider_forwards: int = 0
    row_forwards: int = 0
    committed: list[int] = field(default_factory=list)
    text_tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    cache_bytes: int = 0
    cache_bytes_peak: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that one forward commits in a row that is not finished."""
        return sum(self.committed) / self.row_forwards if self.row_forwards else 0.0

    def columns(self) -> dict[str, Any]:
        """The figures under the names that every table has them by."""
        names = ("forwards", "query_tokens", "guider_forwards", "tokens_per_forward", "seconds")
        return {name: getattr(self, name) for name in (*names, "cache_bytes", "cache_bytes_peak")}


@dataclass(frozen=True)
class Decoded:
    """ids: int64 [batch, G], the generated part, behind an end of text filled with it; with `infill` the whole rows, as
    wide as the input and G; stats: what it cost."""

    ids: torch.Tensor
    stats: Stats
