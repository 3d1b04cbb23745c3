"""What the DuoAttention tests share: gates of the tiny model, the method's expression, feeding, what heads hold."""

from __future__ import annotations

from pathlib import Path

import torch

from textkv import MethodCache
from textkv.duo.pattern import Pattern

GATES = [[0.1, 0.2], [0.9, 0.8], [0.3, 0.7]]
"""A layer whose heads stream at sparsity 0.5, one whose heads are full, and a mixed one."""


def pattern_file(folder: Path) -> str:
    """A pattern of GATES, saved."""
    Pattern(torch.tensor(GATES), sinks=2, recent=4).save(folder / "pattern.json")
    return str(folder / "pattern.json")


def duo(pattern: str | None = None, **arguments) -> str:
    """The expression of the method, with a window of 2 + 3 tokens unless told."""
    given = {"sinks": 2, "recent": 3, **({"pattern": pattern} if pattern else {}), **arguments}
    return f"duo_attention({','.join(f'{k}={v!r}' for k, v in given.items())})"


@torch.no_grad()
def feed(model, cache: MethodCache, ids: torch.Tensor, chunks: int | tuple[int, ...]) -> torch.Tensor:
    """Logits of ids fed in chunks."""
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(chunks, 1)], 1)


def kept(cache: MethodCache, layer: int, head: int) -> list[int]:
    """Positions that a head of row 0 holds."""
    return [p for p in cache.kept_positions(layer)[0, head].tolist() if p >= 0]


def full_set(cache: MethodCache, row: int = 0) -> set[tuple[int, int]]:
    """(layer, head) pairs that hold everything the row has seen."""
    seen = int(cache.layers[0].real_seen[row])
    return {(i, h) for i, x in enumerate(cache.layers) for h, n in enumerate(x.lengths()[row].tolist()) if n == seen}
