"""Retrieval: the base of methods that keep all tokens in host memory and let each decoded one see a few of them.

A prompt is read with exact attention. When its block ends, what is neither first nor recent moves to the host, under an
index of the method's own (`textkv.retrievers`). From then on a token sees the first and the recent tokens, which lie on
the device, and of the others as many as fit its budget beside these: the budget is what a token SEES. At a budget of 1
that is everything, and the outputs are the full cache's. A later block of several tokens reads all rows, exactly.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from textkv.evidence import Evidence
from textkv.layer import Layer
from textkv.method import Capabilities, Method
from textkv.retrievers.base import Retriever
from textkv.segments.host import HostSegment
from textkv.segments.tiered import ALL, Plan, TieredSegment

GIB = 1 << 30


@dataclass(frozen=True)
class Retrieval(Method):
    """Base of methods by retrieval; a subclass makes the retriever. A small budget shrinks first, recent and batch, so
    that at least a quarter of it is for tokens that are retrieved.

    Attributes:
        first: first tokens of each row that stay on the device (attention sinks).
        recent: last tokens that stay on the device.
        batch: tokens by which the recent ones may grow before the oldest of them move to the host together.
        dense: first layers that keep everything on the device.
        host_gib: GiB of host memory that keys and values of the whole cache may take; 0 = what there is.
    """

    first: int = 4
    recent: int = 64
    batch: int = 64
    dense: int = 0
    host_gib: float = 0.0

    capabilities: ClassVar[Capabilities] = Capabilities(retrieves=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("first", "dense", "host_gib"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: cannot be negative; 0 is none")
        for name in ("recent", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1 token")

    @property
    def evicts(self) -> bool:
        """Every token stays, in host memory."""
        return False

    @property
    def budgeted(self) -> bool:
        """The budget is what a token sees."""
        return True

    @abstractmethod
    def retriever(self, layer: Layer, plan: Plan, evidence: Evidence) -> Retriever:
        """An empty retriever for a layer whose first prompt block has come to its end."""

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Moves the first block's tokens; those of later blocks move as they grow old. The budget counts anew."""
        if layer.index < self.dense:
            return
        plan = self.plan(evidence.remaining)
        held = layer.segments[0]
        if isinstance(held, TieredSegment):
            # A first turn may have been short: what stays on the device is counted anew too.
            held.replan(plan if evidence.idle is None else plan.but(evidence.idle, held.plan))
            return
        limit = int(self.host_gib * GIB / layer.context.governed) if self.host_gib else None
        host = HostSegment(self.retriever(layer, plan, evidence), limit)
        layer.replace([TieredSegment(layer.stored(), plan, host)])

    def plan(self, tokens: torch.Tensor) -> Plan:
        """How rows of so many tokens, int64 [batch] on the CPU, divide them."""
        if self.budget.is_full:
            seen = torch.full_like(tokens, ALL)
        elif self.budget.tokens is not None:
            seen = torch.full_like(tokens, self.budget.tokens)
        else:
            seen = torch.tensor([self.budget.count(n) for n in tokens.tolist()])
        first, recent, batch = (
            (seen // part).clamp(min=least, max=most)
            for part, least, most in ((8, 0, self.first), (4, 0, self.recent), (4, 1, self.batch))
        )
        return Plan(seen, first, recent, batch)
