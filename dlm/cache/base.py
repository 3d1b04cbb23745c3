"""What a cache policy is: before each forward of the model it names the slots that are computed anew.

A policy is a frozen configuration; `begin` makes the run of one generation, which owns the stored keys and values and
counts per row. Everything else follows from the plan: keys and values of the named slots are written in place, all
real slots are attended. So a policy never touches a model, and a row's plan depends on that row alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from dlm.canvas import Canvas
from textkv.registry import Registry

if TYPE_CHECKING:
    from dlm.cache.slots import SlotCache


class Plan:
    """The queries of one forward.

    Attributes:
        queries: slots computed anew: a slice if all rows share it, else int64 [batch, q], ascending, -1 = filler.
        visible: bool [batch, n], slots that may be attended; None = all.
        tokens: queries of unfinished rows, padding and filler left out: what the rows would cost if run alone.
        value_tokens: rows whose values are projected besides (only dLLM-Cache).
    """

    def __init__(
        self, queries: slice | torch.Tensor, visible: torch.Tensor | None, tokens: int, value_tokens: int = 0
    ) -> None:
        self.queries, self.visible, self.tokens, self.value_tokens = queries, visible, tokens, value_tokens
        self._slots: torch.Tensor | None = None
        if not isinstance(queries, slice):
            # A filler repeats its row's last query: it computes and writes the same values once more, so nothing
            # has to be masked. A row without queries is finished; its last slot may be rewritten freely.
            self._slots = torch.where(queries < 0, queries.amax(1, keepdim=True), queries).clamp(min=0)

    @property
    def slots(self) -> torch.Tensor | None:
        """int64 [batch, q], `queries` with each filler replaced by a query of its row; None for a slice."""
        return self._slots

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """The queries' entries of x [batch, L]: [batch, q]."""
        return x[:, self.queries] if self._slots is None else x.gather(1, self._slots)

    def rows(self, slots: torch.Tensor) -> torch.Tensor:
        """Where slots int64 [batch, r] stand among the queries; any index for a slot that is negative."""
        if self._slots is None:
            return (slots - self.queries.start).clamp(min=0)
        found = torch.searchsorted(self._slots, slots.contiguous())
        return found.clamp(max=self._slots.shape[1] - 1)

    def doubled(self) -> Plan:
        """The same plan for a batch in which every row stands twice (classifier-free guidance)."""
        queries = self.queries if self._slots is None else self.queries.repeat(2, 1)
        visible = None if self.visible is None else self.visible.repeat(2, 1)
        return Plan(queries, visible, 2 * self.tokens, 2 * self.value_tokens)


def window_plan(canvas: Canvas, low: torch.Tensor, high: torch.Tensor) -> Plan:
    """A plan of one contiguous window [low, high) per row; int64 [batch] on the CPU. Finished rows may be ignored."""
    alive = canvas.unfinished
    real = canvas.real_start_cpu
    first = torch.maximum(low, real)
    tokens = int((high - first)[alive].sum())
    if bool((low == low[alive][0])[alive].all() & (high == high[alive][0])[alive].all()):
        # Padding inside a shared window is computed and never seen.
        start = max(int(low[alive][0]), int(real.min()))
        return Plan(slice(start, int(high[alive][0])), canvas.valid, tokens)
    first, high = first.masked_fill(~alive, canvas.length - 1), high.masked_fill(~alive, canvas.length)
    queries = first[:, None] + torch.arange(int((high - first).max()))
    queries = queries.masked_fill(queries >= high[:, None], -1)
    return Plan(queries.to(canvas.ids.device), canvas.valid, tokens)


class Run(ABC):
    """One generation under a policy.

    Attributes:
        canvas: the canvas being decoded.
        cache: what the model gets as `past_key_values`; None = nothing is stored.
        forwards: forwards planned so far.
    """

    def __init__(self, canvas: Canvas, cache: SlotCache | None) -> None:
        self.canvas, self.cache, self.forwards = canvas, cache, 0

    @abstractmethod
    def reach(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots [low, high) of each row whose logits the next forward can give: int64 [batch] each."""

    @abstractmethod
    def plan(self, wanted: torch.Tensor) -> Plan:
        """The next forward, which must give the logits of slots `wanted` int64 [batch, r] (-1 = none)."""

    def forced(self) -> torch.Tensor | None:
        """int64 [batch], the one slot of a row that the next forward may commit, and must; -1 = none in this row."""
        return None

    def after(self, committed: torch.Tensor) -> None:  # noqa: B027 - most policies read progress from the canvas
        """The forward is done and slots `committed` bool [batch, L] hold a token since."""


class WindowRun(Run):
    """Base of the policies whose queries are one contiguous window per row."""

    @abstractmethod
    def window(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots [low, high) that the next forward computes: int64 [batch] each, on the CPU."""

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The window that is the whole canvas."""
        low = torch.zeros(self.canvas.batch, dtype=torch.int64)
        return low, torch.full_like(low, self.canvas.length)

    def reach(self) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = self.window()
        return (low + self.canvas.shift).to(self.canvas.ids.device), high.to(self.canvas.ids.device)

    def plan(self, wanted: torch.Tensor) -> Plan:
        plan = window_plan(self.canvas, *self.window())
        self.forwards += 1
        return plan


@dataclass(frozen=True)
class Policy(ABC):
    """Base of every policy's configuration."""

    name: ClassVar[str] = ""

    @abstractmethod
    def begin(self, canvas: Canvas, model: Any) -> Run:
        """Starts a generation.

        Raises:
            ValueError: the policy cannot serve this canvas or model.
        """

    @property
    def expression(self) -> str:
        """The composition string that builds this policy again."""
        given = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}({','.join(given)})" if given else self.name


REGISTRY = Registry("cache")
register, find = REGISTRY.register, REGISTRY.find


def check_interval(name: str, value: int | None) -> None:
    """Raises ValueError unless `value` is a whole number of forwards, at least 1, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name}={value!r} is no number of forwards; use 1 or more, or None for never")
