"""What a cache policy is: before each forward of the model it names the slots that are computed anew.

A policy is a frozen configuration; `begin` makes the run of one generation, which owns the stored keys and values and
counts per row. Everything else follows from the plan: keys and values of the named slots are written in place, all
real slots are attended. So a policy never touches a model, and a row's plan depends on that row alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from dlm.cache.plan import Plan, window_plan
from dlm.cache.slots import SlotCache
from dlm.canvas import Canvas
from dlm.models.decoding_spec import DecodingSpec
from textkv.registry import Registry


class Run(ABC):
    """One generation under a policy.

    Attributes:
        canvas: the canvas being decoded.
        cache: what the model gets as `past_key_values`; None = nothing is stored.
        forwards: forwards planned so far.
        suffix: slots behind the active block that are left, see `dlm.cache.suffix`; None = all.
    """

    per_row: ClassVar[tuple[str, ...]] = ()
    """Attributes that are lists or tensors [batch, ..]: rows of a batch leave them when they are finished."""

    def __init__(self, canvas: Canvas, cache: SlotCache | None) -> None:
        self.canvas, self.cache, self.forwards = canvas, cache, 0
        self.suffix: int | None = None
        self._from_block: tuple[torch.Tensor, ...] | None = None

    def kept(self) -> torch.Tensor | None:
        """bool [batch, L] on the CPU, slots that are left where others are pruned; None = all are."""
        if self.suffix is None:
            return None
        slots = torch.arange(self.canvas.length)[None]
        kept = slots < torch.tensor(self._near_end())[:, None]
        kept = kept | (slots == self.canvas.length - 1) | self.canvas.given.cpu()
        return None if bool(kept.all()) else kept

    def from_block(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A logit window from each row's active block to the end of the canvas, made once a block."""
        active = self.canvas.active
        if self._from_block is None or self._from_block[0] is not active:
            first = self.canvas.block_start(active)
            self._from_block = active, first, self.near(torch.full_like(first, self.canvas.length))
        return self._from_block[1:]

    def near(self, high: torch.Tensor) -> torch.Tensor:
        """`high` int64 [batch], the end of a logit window, cut where slots are pruned behind it."""
        if self.suffix is None:
            return high
        return torch.minimum(high, torch.tensor(self._near_end(), device=high.device))

    def _near_end(self) -> list[int]:
        """Behind the last slot of each row before the pruned ones."""
        return [self.canvas.span_of(*each)[1] + self.suffix for each in enumerate(self.canvas.active_rows)]

    @abstractmethod
    def logit_window(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots [low, high) of each row whose logits the next forward can give: int64 [batch] each."""

    @abstractmethod
    def plan(self, wanted: torch.Tensor) -> Plan:
        """The next forward, which must give the logits of slots `wanted` int64 [batch, r] (-1 = none)."""

    def forced(self) -> torch.Tensor | None:
        """int64 [batch], the one slot of a row that the next forward may commit, and must; -1 = none in this row, None
        = in no row.

        In a shifted block-causal model a block's first token is the last block's business: it comes from the row
        before, in the forward that sees the finished block, and the block is begun with it (Fast-dLLM v2).
        """
        canvas = self.canvas
        if canvas.grid is None or not canvas.shift:
            return None
        return self.open_of([canvas.span_of(*each)[0] for each in enumerate(canvas.active_rows)])

    def open_of(self, slots: list[int]) -> torch.Tensor | None:
        """int64 [batch], of `slots`, one of each row, those that hold a mask; -1 = it does not, or lies behind the
        canvas. None = no row has any."""
        canvas = self.canvas
        here = [(row, min(slot, canvas.length - 1)) for row, slot in enumerate(slots)]
        # Looked up on the host: at most steps there is none, and nothing is launched.
        kept = [slot if canvas.host[at] == canvas.mask_id else -1 for slot, at in zip(slots, here, strict=True)]
        return None if max(kept) < 0 else torch.tensor(kept, device=canvas.ids.device)

    @property
    def follows(self) -> bool:
        """Whether `after` does anything: what was committed is not gathered for nothing."""
        return type(self).after is not Run.after

    def after(self, committed: torch.Tensor) -> None:  # noqa: B027 - most policies read progress from the canvas
        """The forward is done and slots `committed` bool [batch, L] hold a token since."""

    def take_rows(self, rows: torch.Tensor) -> None:
        """Keeps rows int64 [kept] (CPU) of the batch; the canvas still has all of them."""
        for name in self.per_row:
            held = getattr(self, name)
            kept = [held[row] for row in rows.tolist()] if isinstance(held, list) else held[rows.to(held.device)]
            setattr(self, name, kept)
        if self.cache is not None:
            self.cache.take_rows(rows, self.canvas.batch)


class WindowRun(Run):
    """Base of the policies whose queries are one contiguous window per row.

    What follows from a window is made once and kept until the window changes, which is seldom within a block.
    """

    def __init__(self, canvas: Canvas, cache: SlotCache | None) -> None:
        super().__init__(canvas, cache)
        self._current: tuple[list[int], list[int]] | None = None
        self._known: tuple[Any, ...] | None = None
        self._made: dict[str, Any] = {}

    @abstractmethod
    def window(self) -> tuple[list[int], list[int]]:
        """Slots [low, high) of each row that the next forward computes."""

    def whole(self) -> tuple[list[int], list[int]]:
        """The window that is the whole canvas."""
        return [0] * self.canvas.batch, [self.canvas.length] * self.canvas.batch

    @property
    def current(self) -> tuple[list[int], list[int]]:
        """`window` of the forward that comes, asked once."""
        if self._current is None:
            self._current = self.window()
            known = (*self._current, None if self.suffix is None else self._near_end())
            if known != self._known:
                self._known, self._made = known, {}
        return self._current

    def logit_window(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The slots that the window's rows predict; on the canvas's device."""
        current = self.current
        if "logits" not in self._made:
            low, high = (torch.tensor(x, device=self.canvas.ids.device) for x in self.predicted(*current))
            self._made["logits"] = low, self.near(high)
        return self._made["logits"]

    def predicted(self, low: list[int], high: list[int]) -> tuple[list[int], list[int]]:
        """Slots [low, high) of each row that the rows of a window predict."""
        # Row j predicts slot j + shift: the first computed row of a shifted model says nothing of its own slot.
        return [first + self.canvas.shift for first in low], high

    def plan(self, wanted: torch.Tensor) -> Plan:
        """Computes the window, whatever is `wanted`: those slots were chosen inside it."""
        low, high = self.current
        if "plan" not in self._made:
            self._made["plan"] = window_plan(self.canvas, torch.tensor(low), torch.tensor(high), self.kept())
        # The forward is counted after the window was read: intervals count from 0.
        self.forwards += 1
        self._current = None
        return self._made["plan"]

    def take_rows(self, rows: torch.Tensor) -> None:
        """Keeps rows int64 [kept] (CPU) of the batch; the canvas still has all of them."""
        super().take_rows(rows)
        self._current = self._known = None


@dataclass(frozen=True)
class Policy(ABC):
    """Base of every policy's configuration."""

    name: ClassVar[str] = ""
    block_causal: ClassVar[bool] = False
    """Whether it serves models whose tokens see no later block, and no others."""

    prunes: ClassVar[bool] = True
    """Whether slots behind the active block can be left out, see `dlm.cache.suffix`."""

    def check(self, spec: DecodingSpec) -> None:  # noqa: B027 - most policies serve every model
        """Raises ValueError if the policy cannot serve a model with this spec."""

    @property
    def whole_blocks(self) -> bool:
        """Whether every forward computes all slots of the active block, the written ones too."""
        return True

    @property
    def still(self) -> bool:
        """Whether, from a block's second forward on, a forward changes nothing that another one in the block reads."""
        return False

    @abstractmethod
    def begin(self, canvas: Canvas, model: Any) -> Run:
        """Starts a generation of a model that `check` lets pass.

        Raises:
            ValueError: the policy cannot serve this canvas or model.
        """

    @property
    def expression(self) -> str:
        """The composition string that builds this policy again, as "freecache(delay=0)+snapkv(0.3)"."""
        changed = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        # A method of textkv stands behind a plus sign, not among the arguments.
        method = changed.pop("method", None)
        given = [f"{name}={value!r}" for name, value in changed.items()]
        own = f"{self.name}({','.join(given)})" if given else self.name
        return own if method is None else f"{own}+{method.expression}"


REGISTRY = Registry("cache", "agentkv.caches", "dlm.cache.base.Policy")
register, find = REGISTRY.register, REGISTRY.find


def check_interval(name: str, value: int | None) -> None:
    """Raises ValueError unless `value` is a whole number of forwards, at least 1, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name}={value!r} is no number of forwards; use 1 or more, or None for never")
