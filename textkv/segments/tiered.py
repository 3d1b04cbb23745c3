"""The tiered segment: first and recent tokens on the device, all between them on the host.

Everything of this layer that a token may not miss lies on the device: the first tokens, and the last ones. When these
become too many, the oldest of them move to the host, in batches, so that an index takes them in together. A decoded
token sees what is on the device and, of the host's tokens, as many as fit its budget beside that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from textkv.segments.base import (
    Step,
    Stored,
    index_of,
    keep_across,
    parted_states,
    picked,
    register_segment,
    storage_bytes,
)
from textkv.segments.dense import DenseSegment
from textkv.segments.host import HostSegment
from textkv.segments.stack import StackSegment

ALL = 1 << 40
"""Tokens of a row that sees everything."""


@dataclass
class Plan:
    """How each row divides its tokens, int64 [batch] on the CPU.

    Attributes:
        seen: tokens that a decoded token may see, its own included.
        first: first tokens that stay on the device.
        recent: last tokens that stay on the device.
        batch: tokens by which the recent ones may grow before the oldest of them move.
    """

    seen: torch.Tensor
    first: torch.Tensor
    recent: torch.Tensor
    batch: torch.Tensor

    def but(self, rows: torch.Tensor, other: Plan) -> Plan:
        """This one, in rows bool [batch] on the CPU the other."""
        return Plan(
            *(torch.where(rows, theirs, x) for x, theirs in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    def take_rows(self, rows: torch.Tensor) -> None:
        """New row i is old row rows[i]."""
        for name, x in vars(self).items():
            setattr(self, name, x[rows.cpu()])


@register_segment("tiered")
class TieredSegment(StackSegment):
    """[first tokens, host, recent tokens], by ascending position.

    Args:
        held: a layer's tokens, of every row and head in ascending position.
        plan: how they are divided.
        host: an empty segment for those between.

    Raises:
        OutOfHostMemory: the host has no room.
    """

    def __init__(self, held: Stored, plan: Plan, host: HostSegment) -> None:
        self.plan = plan
        at = held.positions
        # By position, so that all heads divide alike even where an eviction has left them different tokens.
        newest = at.flatten(1).amax(1).long().cpu()
        edge = host.retriever.edge(newest + 1 - plan.recent)
        first, edge = (x.to(at.device)[:, None, None] for x in (plan.first, edge))
        early = (at >= 0) & (at < first)
        late = (at >= edge) & ~early
        super().__init__([DenseSegment.of(picked(held, early)), host, DenseSegment.of(picked(held, late))])
        host.take(picked(held, (at >= 0) & ~early & ~late))

    @property
    def host(self) -> HostSegment:
        """The tokens between."""
        return self.segments[1]

    def extend(self, step: Step, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As a stack's, with as much of the host as fits beside the device's tokens; then the retriever hears of it."""
        self._make_room(step)
        result = super().extend(step, need_lse)
        self.host.retriever.observe(step.q, step.positions, step.ids)
        return result

    def read(self, step: Step, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `extend` gives, without taking the tokens in."""
        self._make_room(step)
        return super().read(step, need_lse)

    def append(self, step: Step) -> None:
        """Stores among the recent tokens; the retriever hears of it."""
        super().append(step)
        self.host.retriever.observe(step.q, step.positions, step.ids)

    def near(self) -> torch.Tensor:
        """Tokens on the device, int64 [batch] on the CPU."""
        near = torch.zeros_like(self.plan.seen)
        for part in (self.segments[0], self.segments[-1]):
            near = near if part.is_empty() else near + part.lengths().amax(1)
        return near

    def replan(self, plan: Plan) -> None:
        """Tokens are divided by another plan from now on; of the first ones, those that lie on the host come back."""
        self.plan = plan
        if not self.host.is_empty():
            self._hold_first(self.host.give_first(plan.first))

    def _hold_first(self, held: Stored) -> None:
        """Puts tokens behind the first ones that are there."""
        if not held.keys.shape[2]:
            return
        first = self.segments[0]
        if not first.is_empty():
            names = ("keys", "values", "positions")
            held = Stored(*(torch.cat([getattr(x, name) for x in (first.stored(), held)], 2) for name in names))
        self.segments[0] = DenseSegment.of(held)

    def settle(self) -> bool:
        """Moves what is too old to be recent to the host, where more than a batch of it has gathered. First tokens that
        came after the prompt's end stay on the device."""
        recent = self.segments[-1]
        # The host knows the slots; only where they are many is the device asked which tokens are in them.
        if recent.is_empty() or recent.used <= int((self.plan.recent + self.plan.batch).min()):
            return False
        at = recent.held_positions()
        many = (at >= 0).sum(-1)[:, 0].cpu() > self.plan.recent + self.plan.batch
        if not bool(many.any()):
            return False
        rank = (at >= 0).flip(-1).cumsum(-1).flip(-1)  # 1 = the newest
        young = (at >= 0) & (rank <= self.plan.recent.to(at.device)[:, None, None])
        # Tokens before this position are too old; a row without a young one may let all go.
        before = at.masked_fill(~young, ALL_POSITIONS).amin(-1)[:, 0].long().cpu()
        edge = torch.where(many, self.host.retriever.edge(before), 0)
        moved = (at >= 0) & (at < edge.to(at.device)[:, None, None])
        if not bool(moved.any()):
            return False
        held, early = recent.stored(), moved & (at < self.plan.first.to(at.device)[:, None, None])
        self.host.take(picked(held, moved & ~early))
        self._hold_first(picked(held, early))
        recent.keep(index_of((at >= 0) & ~moved))
        return True

    def keep(self, index: torch.Tensor) -> None:
        """Counts slots through all three. A part that keeps nothing stays, empty: tokens will come to it again."""
        first, host, recent = self.segments
        kept = keep_across(self.segments, index)
        if host not in kept and not host.is_empty():
            host.keep(index[..., :0])
        self.segments = [first if first in kept else DenseSegment(), host, recent]

    def take_rows(self, rows: torch.Tensor) -> None:
        """Rows of all three, and of the plan."""
        super().take_rows(rows)
        self.plan.take_rows(rows)

    def crop(self, tokens: int, real: torch.Tensor | None = None) -> None:
        """Takes them from the recent tokens, and from what the retriever has observed."""
        super().crop(tokens, real)
        self.host.retriever.crop(tokens, real)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those of the parts, what the retriever knows of tokens that have not come to the host yet, and the plan by
        "plan.name"."""
        known = {f"1.retriever.{name}": x for name, x in self.host.retriever.tensors().items()}
        return super().tensors() | known | self._of_plan()

    def host_tensors(self) -> dict[str, torch.Tensor]:
        """The host's rows, what its retriever holds there, and the plan."""
        return {f"1.{name}": x for name, x in self.host.host_tensors().items()} | self._of_plan()

    def host_bytes(self) -> int:
        """The host segment's, and the plan's."""
        return self.host.host_bytes() + storage_bytes(list(self._of_plan().values()))

    def state(self) -> dict:
        """States of the parts joined, and the plan."""
        return super().state() | self._of_plan()

    @classmethod
    def from_state(cls, state: dict) -> TieredSegment:
        """The parts, each of its own kind, and the plan."""
        plan = {name.removeprefix("plan."): x.cpu() for name, x in state.items() if name.startswith("plan.")}
        segment = cls.__new__(cls)
        segment.segments, segment.plan = parted_states(state), Plan(**plan)
        return segment

    def _of_plan(self) -> dict[str, torch.Tensor]:
        return {f"plan.{name}": x for name, x in vars(self.plan).items()}

    def _make_room(self, step: Step) -> None:
        several = step.k.shape[2] > 1
        coming = (step.positions >= 0).sum(1).cpu() if several and step.padded else step.k.shape[2]
        self.host.room = (self.plan.seen - self.near() - coming).clamp(min=0)
        # Whatever comes to its neighbours, a row's single token sees what a decoded one sees.
        self.host.single = coming == 1 if several and step.padded and bool((coming == 1).any()) else None


ALL_POSITIONS = torch.iinfo(torch.int32).max
