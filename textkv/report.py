"""What a cache holds, in numbers: bytes from storages, tokens seen and stored per layer and head, seconds per hook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from textkv.cache import MethodCache


@dataclass(frozen=True)
class CacheReport:
    """A snapshot of a cache.

    Attributes:
        method: composition string.
        budget: as asked for.
        kv_bytes: bytes held now, bookkeeping included.
        full_bytes: bytes of K and V that a cache without eviction would hold.
        peak_bytes: highest kv_bytes so far, the moment before each eviction included.
        rows: per layer {"layer", "seen", "stored" (per stored head, mean over the batch), "bytes"}.
        seconds: time spent in each hook so far.
    """

    method: str
    budget: str
    kv_bytes: int
    full_bytes: int
    peak_bytes: int
    rows: tuple[dict, ...]
    seconds: dict[str, float]

    def __str__(self) -> str:
        share = self.kv_bytes / self.full_bytes if self.full_bytes else 0.0
        head = (
            f"{self.method} at budget {self.budget}: {self.kv_bytes:,} bytes held, {share:.1%} of the full cache's "
            f"{self.full_bytes:,}; peak {self.peak_bytes:,}"
        )
        lines = [
            f"  layer {row['layer']:>2}: {row['seen']} seen, stored per head "
            f"{min(row['stored'], default=0):g} to {max(row['stored'], default=0):g}, {row['bytes']:,} bytes"
            for row in self.rows
        ]
        times = ", ".join(f"{hook} {1000 * s:.1f} ms" for hook, s in sorted(self.seconds.items()))
        return "\n".join([head, *lines, f"  hooks: {times or 'none ran'}"])


def report(cache: MethodCache) -> CacheReport:
    """The snapshot of `cache` now."""
    rows = tuple(
        {
            "layer": layer.index,
            "seen": layer.seen,
            "stored": layer.lengths().float().mean(0).tolist() if layer.is_initialized else [],
            "bytes": layer.kv_bytes(),
        }
        for layer in cache.layers
    )
    return CacheReport(
        method=cache.method.expression,
        budget=str(cache.method.budget),
        kv_bytes=cache.kv_bytes(),
        full_bytes=cache.full_bytes(),
        peak_bytes=cache.peak_bytes,
        rows=rows,
        seconds=dict(cache.seconds),
    )
