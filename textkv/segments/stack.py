"""The stack: segments one behind the other as a single one, for where only one segment has a place.

A layer holds a list of segments itself; a part of a split segment is one segment. Where such a part packs its older
tokens, it becomes a stack of packed tokens and the buffer that grows.
"""

from __future__ import annotations

import torch

from kernels import merge
from textkv.segments.base import NewTokens, Segment, Stored
from textkv.segments.dense import DenseSegment
from textkv.segments.packed import PackedSegment

KINDS: dict[str, type[Segment]] = {"packed": PackedSegment, "dense": DenseSegment}
"""What a stack may be made of, by the name under which it is saved."""


class StackSegment(Segment):
    """Segments in the order of their tokens; the last one grows."""

    def __init__(self, segments: list[Segment]) -> None:
        self.segments = segments

    def extend(self, new: NewTokens, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        last = self.segments[-1].extend(new, need_lse=True)
        return self._merged([segment.attend(new.q, new.scale) for segment in self.segments[:-1]] + [last])

    def attend(self, q: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        return self._merged([segment.attend(q, scale) for segment in self.segments])

    def stored(self) -> Stored:
        parts = [segment.stored() for segment in self.segments]
        return Stored(*(torch.cat([getattr(part, f) for part in parts], 2) for f in ("keys", "values", "positions")))

    def lengths(self) -> torch.Tensor:
        return sum(segment.lengths() for segment in self.segments)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{i}.{name}": x for i, part in enumerate(self.segments) for name, x in part.tensors().items()}

    def take_rows(self, rows: torch.Tensor) -> None:
        for segment in self.segments:
            segment.take_rows(rows)

    def crop(self, tokens: int) -> None:
        self.segments[-1].crop(tokens)

    def state(self) -> dict:
        state: dict = {"kinds": []}
        for i, segment in enumerate(self.segments):
            state["kinds"].append(next(name for name, cls in KINDS.items() if type(segment) is cls))
            state |= {f"{i}.{name}": x for name, x in segment.state().items()}
        return state

    @classmethod
    def from_state(cls, state: dict) -> StackSegment:
        parts = []
        for i, kind in enumerate(state["kinds"]):
            own = {name.removeprefix(f"{i}."): x for name, x in state.items() if name.startswith(f"{i}.")}
            parts.append(KINDS[kind].from_state(own))
        return cls(parts)

    @staticmethod
    def _merged(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        return merge([out for out, _ in parts], [lse for _, lse in parts])
