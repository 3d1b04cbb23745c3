"""The stack: segments one behind the other as a single one, for where only one segment has a place.

A layer holds a list of segments itself; a part of a split segment is one segment. Where such a part packs its older
tokens, it becomes a stack of packed tokens and the buffer that grows.
"""

from __future__ import annotations

import torch

from kernels import merge
from textkv.segments.base import SEGMENTS, Segment, Step, Stored, keep_across, register_segment


@register_segment("stack")
class StackSegment(Segment):
    """Segments in the order of their tokens; the last one grows."""

    def __init__(self, segments: list[Segment]) -> None:
        self.segments = segments

    def extend(self, step: Step, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        # The last one takes the tokens in and sees the block causally; all others lie before it.
        last = self.segments[-1].extend(step, need_lse=True)
        return self._merged(self.segments[:-1], step.q, step.scale, step.softcap, step.hidden, [last])

    def append(self, step: Step) -> None:
        self.segments[-1].append(step)

    def attend(
        self, q: torch.Tensor, scale: float, *, softcap: float | None = None, hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._merged(self.segments, q, scale, softcap, hidden, [])

    def keep(self, index: torch.Tensor) -> None:
        self.segments = keep_across(self.segments, index)

    def stored(self) -> Stored:
        parts = [segment.stored() for segment in self.segments]
        return Stored(*(torch.cat([getattr(part, f) for part in parts], 2) for f in ("keys", "values", "positions")))

    def held_positions(self) -> torch.Tensor:
        return torch.cat([segment.held_positions() for segment in self.segments], 2)

    def lengths(self) -> torch.Tensor:
        return sum(segment.lengths() for segment in self.segments)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{i}.{name}": x for i, part in enumerate(self.segments) for name, x in part.tensors().items()}

    def take_rows(self, rows: torch.Tensor) -> None:
        for segment in self.segments:
            segment.take_rows(rows)

    def crop(self, tokens: int, real: torch.Tensor | None = None) -> None:
        self.segments[-1].crop(tokens, real)

    def state(self) -> dict:
        # Names tell which class reads each part back; tensors carry their part's number.
        state: dict = {"kinds": [segment.name for segment in self.segments]}
        for i, segment in enumerate(self.segments):
            state |= {f"{i}.{name}": x for name, x in segment.state().items()}
        return state

    @classmethod
    def from_state(cls, state: dict) -> StackSegment:
        parts = []
        for i, kind in enumerate(state["kinds"]):
            own = {name.removeprefix(f"{i}."): x for name, x in state.items() if name.startswith(f"{i}.")}
            parts.append(SEGMENTS.find(kind).from_state(own))
        return cls(parts)

    @staticmethod
    def _merged(segments, q, scale, softcap, hidden, more) -> tuple[torch.Tensor, torch.Tensor]:
        # An empty part has no shape yet, and no weight in the merge.
        parts = [x.attend(q, scale, softcap=softcap, hidden=hidden) for x in segments if not x.is_empty()] + more
        return parts[0] if len(parts) == 1 else merge([out for out, _ in parts], [lse for _, lse in parts])
