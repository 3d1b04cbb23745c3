"""The stack: segments one behind the other as a single one, for where only one segment has a place.

A layer holds a list of segments itself; a part of a split segment is one segment. Where such a part packs its older
tokens, it becomes a stack of packed tokens and the buffer that grows.
"""

from __future__ import annotations

import torch

from textkv.kernels import merge
from textkv.segments.base import (
    Segment,
    Step,
    Stored,
    joined_states,
    keep_across,
    parted_states,
    register_segment,
)


@register_segment("stack")
class StackSegment(Segment):
    """Segments in the order of their tokens; the last one grows."""

    def __init__(self, segments: list[Segment]) -> None:
        self.segments = segments

    def extend(self, step: Step, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The last segment takes the tokens in; to all others they are later than every token. An lse always comes."""
        # The last one takes the tokens in and sees the block causally; all others lie before it.
        last = self.segments[-1].extend(step, need_lse=True)
        return self._merged(self.segments[:-1], step.q, step.scale, step.softcap, step.hidden, [last])

    def append(self, step: Step) -> None:
        """Stores in the last segment."""
        self.segments[-1].append(step)

    def attend(
        self, q: torch.Tensor, scale: float, *, softcap: float | None = None, hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Merges the attention over all segments that hold a token."""
        return self._merged(self.segments, q, scale, softcap, hidden, [])

    def keep(self, index: torch.Tensor) -> None:
        """Counts slots through all segments; one that keeps nothing is dropped, unless it is the last."""
        self.segments = keep_across(self.segments, index)

    def stored(self) -> Stored:
        """A copy, each segment's slots behind those of the one before."""
        parts = [segment.stored() for segment in self._known()]
        return Stored(*(torch.cat([getattr(part, f) for part in parts], 2) for f in ("keys", "values", "positions")))

    def held_positions(self) -> torch.Tensor:
        """int32 [batch, kv_heads, n], in the order of `stored`, without unpacking anything."""
        return torch.cat([segment.held_positions() for segment in self._known()], 2)

    def lengths(self) -> torch.Tensor:
        """The sum over the segments."""
        return sum(segment.lengths() for segment in self._known())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those of all segments by "number.name"."""
        return {f"{i}.{name}": x for i, part in enumerate(self.segments) for name, x in part.tensors().items()}

    def take_rows(self, rows: torch.Tensor) -> None:
        """Every segment takes the rows."""
        for segment in self.segments:
            segment.take_rows(rows)

    def crop(self, tokens: int, real: torch.Tensor | None = None) -> None:
        """Takes them from the last segment: older ones hold packed tokens."""
        self.segments[-1].crop(tokens, real)

    def state(self) -> dict:
        """States of the segments joined."""
        return joined_states(self.segments)

    @classmethod
    def from_state(cls, state: dict) -> StackSegment:
        """The segments, each of its own kind."""
        return cls(parted_states(state))

    def _known(self) -> list[Segment]:
        """Without those that nothing ever came to: they do not know the shape of a token."""
        return [segment for segment in self.segments if segment.tensors()] or self.segments[-1:]

    @staticmethod
    def _merged(segments, q, scale, softcap, hidden, more) -> tuple[torch.Tensor, torch.Tensor]:
        # An empty part has no shape yet, and no weight in the merge.
        parts = [x.attend(q, scale, softcap=softcap, hidden=hidden) for x in segments if not x.is_empty()] + more
        return parts[0] if len(parts) == 1 else merge([out for out, _ in parts], [lse for _, lse in parts])
