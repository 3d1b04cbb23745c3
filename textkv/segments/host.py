"""The host segment: tokens in host memory, of which a query sees those that a retriever chooses for it.

A single query per row fetches the rows that it is to see; a block of queries reads all rows, a part at a time, because
a prompt's tokens would together want most of them anyway. Either way what was seen is attended exactly, so that the
layer can merge it with what lies on the device.
"""

from __future__ import annotations

import torch

from textkv.kernels import decode_attention, merge
from textkv.retrievers.base import RETRIEVERS, Looked, Retriever
from textkv.segments.base import Segment, Step, Stored, index_of, picked, register_segment, shown
from textkv.segments.host_rows import HostRows

_OWN = "retriever."


@register_segment("host")
class HostSegment(Segment):
    """Rows on the host behind a retriever.

    Args:
        retriever: chooses; it belongs to this segment alone.
        limit: bytes of keys and values that may be held, or None.

    Attributes:
        rows: the tokens, None before the first.
        room: int64 [batch] on the CPU, tokens that a query of each row may see here; set by who holds the segment.
        single: bool [batch] on the CPU, rows of which a block of several queries has one, the last, and padding before
            it; None = there are none. Set likewise.
        seen: int64 [batch] on the CPU, tokens of its busiest head that the last single query of each row saw.
        looked: what retrieval has cost so far.
    """

    def __init__(self, retriever: Retriever, limit: int | None = None) -> None:
        self.retriever, self.limit = retriever, limit
        self.rows: HostRows | None = None
        self.room: torch.Tensor | None = None
        self.single: torch.Tensor | None = None
        self.seen: torch.Tensor | None = None
        self.looked = Looked()

    def take(self, held: Stored) -> None:
        """Moves tokens here, behind those there are, and tells the retriever.

        Raises:
            OutOfHostMemory: no room; nothing has changed.
        """
        if not held.keys.shape[2]:
            return
        if self.rows is None:
            self.rows = HostRows(held.keys, held.values, held.positions, self.limit)
            self.retriever.build(*self._index_of(), self.rows.device)
        else:
            self.rows.append(held.keys, held.values, held.positions)
            self.retriever.update(*self._index_of())
        self._check()

    def append(self, step: Step) -> None:
        """Raises RuntimeError: new tokens go to the segment behind this one, and come here by `take`."""
        raise RuntimeError("new tokens go to the segment behind the host's")

    def is_empty(self) -> bool:
        """Whether nothing ever came, or nothing is left."""
        return self.rows is None or not self.rows.used

    def attend(
        self, q: torch.Tensor, scale: float, *, softcap: float | None = None, hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One query sees what the retriever chooses within `room`; several, or one that may see all, read all rows."""
        if q.shape[2] > 1 or self.room is None or bool((self.room >= self.rows.used).all()):
            found = self._scan(q, scale, softcap, hidden)
            return found if q.shape[2] == 1 or self.single is None else self._beside(found, q, scale, softcap, hidden)
        return self._retrieved(q, self.room, scale, softcap, hidden)

    def _retrieved(self, q, room, scale, softcap, hidden) -> tuple[torch.Tensor, torch.Tensor]:
        self._check()
        slots = self.retriever.query(q, room, *self._index_of())
        batch, heads = slots.shape[:2]
        k, v = self.rows.fetch(slots)
        at = self.rows.held()[2].repeat_interleave(heads // self.rows.k.shape[1], 1)
        at = at.gather(2, slots.clamp(min=0)).masked_fill(slots < 0, -1).to(q.device)
        self._count(q, slots)
        if not slots.shape[2]:
            return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
        return decode_attention(q, k, v, scale=scale, softcap=softcap, valid=shown(at, hidden))

    def _beside(self, found, q, scale, softcap, hidden) -> tuple[torch.Tensor, torch.Tensor]:
        """What a block found, in rows of a `single` query what that one retrieves."""
        if bool((self.room >= self.rows.used)[self.single].all()):
            return found
        room, seen = torch.where(self.single, self.room, 0), self.seen
        alone = self._retrieved(q[:, :, -1:], room, scale, softcap, hidden)
        if seen is not None:
            self.seen = torch.where(self.single, self.seen, seen)
        rows = self.single.to(q.device)
        parts = [torch.cat([every[:, :, :-1], one.to(every.dtype)], 2) for every, one in zip(found, alone, strict=True)]
        return tuple(
            torch.where(rows.view(-1, *[1] * (every.dim() - 1)), part, every)
            for every, part in zip(found, parts, strict=True)
        )

    def _scan(self, q, scale, softcap, hidden) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [
            decode_attention(q, k, v, scale=scale, softcap=softcap, valid=shown(at, hidden))
            for k, v, at in self.rows.blocks()
        ]
        if q.shape[2] == 1:
            heads = q.shape[0] * q.shape[1]
            self.looked.compared += heads * self.rows.used
            self.looked.stored += heads * self.rows.used
            self.looked.fetched += q.shape[0] * self.rows.k.shape[1] * self.rows.used
            self.seen = self.lengths().amax(1)
        return parts[0] if len(parts) == 1 else merge([out for out, _ in parts], [lse for _, lse in parts])

    def _count(self, q: torch.Tensor, slots: torch.Tensor) -> None:
        self.looked.compared += self.retriever.compared
        self.looked.stored += q.shape[0] * q.shape[1] * self.rows.used
        found = (slots >= 0).sum(-1)
        self.looked.fetched += int(found.sum())
        self.seen = found.amax(1)

    def keep(self, index: torch.Tensor) -> None:
        """Rows close up in new rectangles; the retriever hears what stayed."""
        index = index.cpu().expand(-1, self.rows.k.shape[1], -1)
        self.rows.keep(index)
        self.retriever.keep(index, *self._index_of(), self.rows.device)
        self._check()

    def give_first(self, first: torch.Tensor) -> Stored:
        """Lets go of the tokens of each row before position `first`, int64 [batch] on the CPU, and returns them on the
        device."""
        held = Stored(*self.rows.held())
        real = held.positions >= 0
        given = real & (held.positions < first[:, None, None])
        found = picked(held, given)
        if found.keys.shape[2]:
            self.keep(index_of(real & ~given))
        return Stored(*(x.to(self.rows.device) for x in vars(found).values()))

    def stored(self) -> Stored:
        """A copy on the device: all rows, whatever a query sees of them."""
        return Stored(*(x.to(self.rows.device) for x in self.rows.held()))

    def held_positions(self) -> torch.Tensor:
        """Positions alone, on the device."""
        return self.rows.held()[2].to(self.rows.device)

    def lengths(self) -> torch.Tensor:
        """Counted on the host. [0, 0] before any token."""
        if self.rows is None:
            return torch.zeros(0, 0, dtype=torch.int64)
        return (self.rows.held()[2] >= 0).sum(-1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Rows, and what the retriever holds on either side."""
        if self.rows is None:
            return {}
        return self.host_tensors() | {_OWN + name: x for name, x in self.retriever.tensors().items()}

    def host_tensors(self) -> dict[str, torch.Tensor]:
        """Rows, and what the retriever holds on the host."""
        if self.rows is None:
            return {}
        return self.rows.tensors() | {_OWN + name: x for name, x in self.retriever.host_tensors().items()}

    def host_bytes(self) -> int:
        """Bytes of tensors on the host, and of what a library holds there for the retriever."""
        return super().host_bytes() + self.retriever.library_bytes()

    def take_rows(self, rows: torch.Tensor) -> None:
        """Rows of the batch, room and index alike."""
        if self.room is not None:
            self.room = self.room[rows.cpu()]
        self.seen = self.single = None
        if self.rows is not None:
            self.rows.take_rows(rows)
        self.retriever.take_rows(rows)

    def crop(self, tokens: int, real: torch.Tensor | None = None) -> None:
        """Raises ValueError: what has come here is not taken back."""
        if tokens:
            raise ValueError(f"crop({-tokens}): tokens in host memory are not taken back; fork the cache before them")

    def state(self) -> dict:
        """Rows without idle slots, the retriever's state, and its name."""
        state = {"retriever": self.retriever.name, "limit": self.limit}
        if self.rows is not None:
            state |= dict(zip(("k", "v", "positions"), self.rows.held(), strict=True))
        return state | {_OWN + name: x for name, x in self.retriever.state().items()}

    @classmethod
    def from_state(cls, state: dict) -> HostSegment:
        """The segment, its tensors back in host memory.

        Raises:
            ValueError: an unknown retriever, or an index of another length.
        """
        own = {name.removeprefix(_OWN): x for name, x in state.items() if name.startswith(_OWN)}
        segment = cls(RETRIEVERS.find(state["retriever"]).from_state(own), state["limit"])
        if "k" in state:
            segment.rows = HostRows(state["k"], state["v"], state["positions"], state["limit"])
            segment._check()
        return segment

    def _index_of(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, _, positions = self.rows.held()
        return keys, positions

    def _check(self) -> None:
        """Raises ValueError if the index is one of other tokens."""
        if self.retriever.length != self.rows.used:
            raise ValueError(
                f"retriever {self.retriever.name}: its index was built for {self.retriever.length} tokens and "
                f"{self.rows.used} are stored; build it again from their keys"
            )
