"""What a cache holds, in numbers: bytes from storages, tokens seen and stored per layer and head, seconds per hook."""

from __future__ import annotations

from dataclasses import dataclass

from textkv.context import Context
from textkv.segments.tiered import TieredSegment


@dataclass(frozen=True)
class CacheReport:
    """A snapshot of a cache.

    Attributes:
        method: composition string.
        budget: as asked for.
        governed: how many of the model's layers the method governs.
        kv_bytes: bytes held now on the model's device, bookkeeping included.
        host_bytes: bytes held in host memory although the model runs on a device.
        full_bytes: bytes that the model's own cache would hold.
        peak_bytes: highest kv_bytes so far, the moment before each eviction included.
        state_bytes: of kv_bytes, linear and convolution states.
        rows: per layer that stores tokens {"layer", "kind", "seen", "stored" (per stored head, mean over the batch),
            "bytes"}.
        seconds: time spent in each hook so far.
        scanned: keys or summaries compared with a query per token stored on the host, where tokens are retrieved; None
            where none were.
    """

    method: str
    budget: str
    governed: int
    kv_bytes: int
    host_bytes: int
    full_bytes: int
    peak_bytes: int
    state_bytes: int
    rows: tuple[dict, ...]
    seconds: dict[str, float]
    scanned: float | None = None

    def __str__(self) -> str:
        share = self.kv_bytes / self.full_bytes if self.full_bytes else 0.0
        head = (
            f"{self.method} at budget {self.budget}: {self.kv_bytes:,} bytes held, {share:.1%} of the full cache's "
            f"{self.full_bytes:,}; peak {self.peak_bytes:,}; governs {self.governed} of {len(self.rows)} layers"
        )
        if self.host_bytes:
            seen = "" if self.scanned is None else f", {self.scanned:.1%} of its tokens compared with a query"
            head += f"; {self.host_bytes:,} bytes on the host{seen}"
        lines = [_line(row) for row in self.rows]
        times = ", ".join(f"{hook} {1000 * s:.1f} ms" for hook, s in sorted(self.seconds.items()))
        return "\n".join([head, *lines, f"  hooks: {times or 'none ran'}"])


def _line(row: dict) -> str:
    kind = "" if row["kind"] == "full" else f" ({row['kind']})"
    stored = f"{min(row['stored'], default=0):g} to {max(row['stored'], default=0):g}"
    return f"  layer {row['layer']:>2}{kind}: {row['seen']} seen, stored per head {stored}, {row['bytes']:,} bytes"


def scanned(context: Context) -> float | None:
    """What queries compared per token stored on the host, in all layers; None where nothing was retrieved."""
    found = [x.host.looked for layer in context.layers for x in layer.segments if isinstance(x, TieredSegment)]
    stored = sum(x.stored for x in found)
    return sum(x.compared for x in found) / stored if stored else None


def report(context: Context) -> CacheReport:
    """The snapshot of a cache now."""
    layers = [layer for layer in context.everything if hasattr(layer, "segments")]
    rows = tuple(
        {
            "layer": layer.kind.number,
            "kind": layer.kind.name,
            "seen": layer.seen,
            "stored": layer.lengths().float().mean(0).tolist() if layer.is_initialized else [],
            "bytes": layer.kv_bytes(),
        }
        for layer in layers
    )
    return CacheReport(
        method=context.method.expression,
        budget=str(context.method.budget),
        governed=context.governed,
        kv_bytes=context.kv_bytes(),
        host_bytes=sum(layer.host_bytes() for layer in layers),
        full_bytes=context.full_bytes(),
        peak_bytes=context.peak_bytes,
        state_bytes=context.state_bytes(),
        rows=rows,
        seconds=dict(context.seconds),
        scanned=scanned(context),
    )
