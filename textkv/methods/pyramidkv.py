"""PyramidKV: early layers keep more than late ones, on SnapKV's scores (arXiv 2406.02069).

Counts fall along a straight line over the layers, from the first to the last. The authors floor the step of the line,
so their layers together hold more than budget x layers; `pyramidkv` spends exactly that sum, `pyramidkv-official`
keeps their arithmetic.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from textkv.budgets import round_to_sum
from textkv.evidence import Evidence
from textkv.layer import Layer
from textkv.method import register
from textkv.methods.snapkv import SnapKV


@register("pyramidkv")
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with a budget per layer; the budget is the mean over layers.

    Attributes:
        beta: how steep: the last layer keeps 1 / beta of the uniform count (besides the window); 1 = SnapKV.
    """

    beta: int = 20

    least: ClassVar[int] = 1
    """Tokens before the window that every layer keeps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise ValueError(f"beta={self.beta}: 1 keeps the same in every layer, larger is steeper; the paper uses 20")

    def fits(self, layer: Layer, evidence: Evidence) -> bool:
        """By the layer's own number: in a later turn a late layer is above it long before it reaches the budget."""
        return bool((layer.lengths().amax(1) <= self.counts(layer, None, evidence)[:, 0]).all())

    def counts(self, layer: Layer, scores: torch.Tensor | None, evidence: Evidence) -> torch.Tensor:
        """The layer's point on the line, for each row: int64 [batch, 1]."""
        layers = layer.context.governed
        rows = []
        for seen in evidence.remaining.tolist():
            keep = self.budget.count(seen)
            window = min(self.window, keep - 1, seen - 1)
            rows.append([self.line(keep, window, seen, layers)[layer.index]])
        return torch.tensor(rows)

    def line(self, keep: int, window: int, seen: int, layers: int) -> list[int]:
        """Tokens per layer, the window included: `keep` on average, at most `seen`, at least the window + `least`."""
        high, low = self._ends(keep - window, seen - window)
        if layers == 1 or high <= low:
            return [keep] * layers
        # Rounded together: numbers rounded one by one would not sum to the budget.
        exact = torch.linspace(high, low, layers, dtype=torch.float64)
        return (window + round_to_sum(exact, (keep - window) * layers)).tolist()

    def _ends(self, past: int, most: int) -> tuple[int, int]:
        """Tokens before the window in the first and in the last layer, for `past` on average and at most `most`."""
        low = max(self.least, past // self.beta)
        # A line's mean is that of its ends.
        high = 2 * past - low
        return (high, low) if high <= most else (most, 2 * past - most)


@register("pyramidkv-official")
@dataclass(frozen=True)
class PyramidKVOfficial(PyramidKV):
    """PyramidKV as released: a floored step, uniform counts while the prompt is shorter than twice the budget, and a
    last layer that may keep nothing but its window."""

    least: ClassVar[int] = 0

    def line(self, keep: int, window: int, seen: int, layers: int) -> list[int]:
        """Tokens per layer, down from the first one's number by the authors' floored step; they exceed the budget."""
        past = keep - window
        high, low = self._ends(past, seen - window)
        # Theirs refuses a budget that the window fills; here the window shrinks, and one past token cannot be shared.
        if layers == 1 or seen < 2 * past or high <= low or keep <= self.window:
            return [keep] * layers
        step = (high - low) // (layers - 1)
        return [window + high - index * step for index in range(layers)]
