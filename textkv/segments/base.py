"""A segment: one store of one layer's tokens that can take tokens in, attend over them, and say what it weighs.

A layer is a short list of segments; the last one grows. Each gives back (output, log-sum-exp), so a layer merges any
number of them exactly. Shapes: queries [batch, heads, m, head_dim]; keys and values [batch, kv_heads, n, head_dim];
positions [batch, kv_heads or 1, n] int32, the token's logical index in its row, -1 where a slot holds no token.

A segment of your own subclasses `Segment`, takes a name by `register_segment`, and is then saved, loaded, copied,
cropped and counted like ours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from textkv.kernels import decode_attention, merge
from textkv.kernels.beside import Exact, merge_exact
from textkv.positions import RotarySpec
from textkv.registry import Registry
from textkv.softmax import Softmax

SEGMENTS = Registry("segment", "agentkv.segments", "textkv.segments.base.Segment")
register_segment = SEGMENTS.register
"""Class decorator: makes a segment known by the name under which it is saved."""


@dataclass(frozen=True)
class Step:
    """One forward of one layer: the new tokens and all that the layer must know about the call.

    Attributes:
        q: [batch, heads, m, head_dim], post-RoPE.
        k, v: [batch, kv_heads, m, head_dim], keys post-RoPE.
        positions: [batch, m] int32 logical index per row, -1 for padding.
        scale: softmax scale.
        padded: whether any position is -1 (known on the host, so that the common case needs no check).
        rope_positions: [batch, m] int64 rotary position (the temporal axis under M-RoPE), or None if not asked for.
        softcap, sinks: see `Softmax`; a sink is no segment's: the layer counts it when all have attended.
        hidden: bool [batch, p], True at logical positions whose tokens this forward may not see although they are
            stored: the caller's mask has a zero there. Positions from p on may be seen. None = all may.
        visible: bool [batch or 1, m, m], which new token (row) sees which (column); None = each sees those before it.
        local: whether a layer's window narrows what a token sees; False = it sees all that the layer holds.
        ids: int64 [batch, m] token ids, or None if not asked for.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    scale: float
    padded: bool = False
    rope_positions: torch.Tensor | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    visible: torch.Tensor | None = None
    local: bool = True
    ids: torch.Tensor | None = None

    @property
    def softmax(self) -> Softmax:
        """How the model weighs products of queries and keys."""
        return Softmax(self.scale, self.softcap, self.sinks)

    def part(self, which: slice) -> Step:
        """Some of the new tokens, of a step in which nothing is padded, hidden or visible but by causality."""
        q, k, v = (x[:, :, which] for x in (self.q, self.k, self.v))
        rope = None if self.rope_positions is None else self.rope_positions[:, which]
        return replace(self, q=q, k=k, v=v, positions=self.positions[:, which], rope_positions=rope)


@dataclass(frozen=True)
class Stored:
    """A padded look at what a segment holds, for scoring: no copy where the segment is dense.

    keys, values [batch, kv_heads, n, head_dim]; positions [batch, kv_heads, n] (-1 = hole).
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor


class Segment(ABC):
    """See the module's docstring. `tensors()` is the whole truth about what a segment holds in memory."""

    name = ""
    """Under which it is saved: set by `register_segment`."""
    stays = False
    """Whether its layer keeps it when it holds no token any more: what it was made with cannot be made again."""
    takes_beside = False
    """Whether `attend_beside` is cheaper than attentions that are merged."""

    def extend(self, step: Step, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Takes the new tokens in and lets their queries attend causally to everything visible here.

        Returns (out [batch, heads, m, head_dim], lse [batch, heads, m] fp32 or None if not needed).
        """
        # A block's own tokens need a causal edge, and padding must not be seen: both are easier before they are stored.
        if step.q.shape[2] > 1 or step.padded or self.is_empty():
            result = self.read(step, need_lse)
            self.append(step)
            return result
        self.append(step)
        return self.attend(step.q, step.scale, softcap=step.softcap, hidden=step.hidden)

    def read(self, step: Step, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `extend` returns, without taking the tokens in: for layers that read another one's keys."""
        if self.is_empty():
            return block_attention(step, need_lse)
        # What is here lies before every new token, so only the block itself needs a causal edge: both parts run
        # through fused attention, which knows no edge that starts in the middle.
        before = self.attend(step.q, step.scale, softcap=step.softcap, hidden=step.hidden)
        within = block_attention(step, need_lse=True)
        return merge([before[0], within[0]], [before[1], within[1]])

    def settle(self) -> bool:
        """What came will not be taken back: lets go of what no later token can see. Returns whether there was any."""
        return False

    def is_empty(self) -> bool:
        """Whether no token is stored, as far as the host knows."""
        return not self.tensors()

    @abstractmethod
    def append(self, step: Step) -> None:
        """Stores the new tokens without attending; padding (position -1) may be left out or kept as holes."""

    @abstractmethod
    def attend(
        self,
        q: torch.Tensor,
        scale: float,
        *,
        softcap: float | None = None,
        hidden: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries attend to every token here but the `hidden` (see `Step`); all lie before them. Returns (out, lse)."""

    def attend_beside(
        self, q: torch.Tensor, scale: float, softcap: float | None, exact: Exact
    ) -> tuple[torch.Tensor | None, ...]:
        """`attend` with the exact tokens of other segments beside those here, of which there is one at least.

        Args:
            exact: their keys and values [batch, kv_heads, r, head_dim], in order, and what is asked for.

        Returns:
            out like q [batch, heads, m, head_dim]; lse fp32 [batch, heads, m], None if it was not asked for and cost
            anything; with `exact.row` what the query looked at of the last segment's tokens, fp32 [batch, heads, r],
            out of all that it looked at.
        """
        return merge_exact(*self.attend(q, scale, softcap=softcap), q, exact, scale, softcap)

    def rectangle(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values [batch, kv_heads, n, head_dim] of exact tokens that fill a rectangle, as they lie; None where
        there are holes, as far as the host knows, or anything else is held."""
        return None

    @abstractmethod
    def keep(self, index: torch.Tensor) -> None:
        """Keeps the slots `index` of `stored()`, int64 [batch, kv_heads or 1, c], ascending, -1 = no token; lets go of
        all others. Never makes bytes grow, and never unpacks what stays unless that frees bytes.
        """

    def keep_mask(self, mask: torch.Tensor) -> Segment:
        """Keeps the slots where bool [batch, kv_heads, n] is True; returns the segment that holds them from now on."""
        self.keep(index_of(mask))
        return self

    def turn(self, delta: torch.Tensor, rotary: RotarySpec) -> None:
        """Turns the keys as if each token stood further on: delta int32 [batch, n] rotary positions, by logical ones.

        Raises:
            ValueError: keys are not held as they were read.
        """
        raise ValueError(f"a {self.name or type(self).__name__} segment cannot turn the keys that it holds")

    @abstractmethod
    def stored(self) -> Stored:
        """What is held, padded to one length."""

    def held_positions(self) -> torch.Tensor:
        """Logical positions of `stored()` alone: int32 [batch, kv_heads, n], -1 = hole."""
        return self.stored().positions

    @abstractmethod
    def lengths(self) -> torch.Tensor:
        """Tokens stored, int64 [batch, kv_heads], on the CPU."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor held, by name (bytes, saving, moving); empty before the first token."""

    def host_tensors(self) -> dict[str, torch.Tensor]:
        """Those of `tensors()` that lie in host memory although the model runs on a device."""
        return {}

    def device_bytes(self) -> int:
        """Bytes held on the model's device."""
        host = {id(x) for x in self.host_tensors().values()}
        return storage_bytes([x for x in self.tensors().values() if id(x) not in host])

    def host_bytes(self) -> int:
        """Bytes held in host memory."""
        return storage_bytes(list(self.host_tensors().values()))

    @abstractmethod
    def take_rows(self, rows: torch.Tensor) -> None:
        """Rearranges the batch: new row i is old row rows[i] (beams, expansion, selection)."""

    def state(self) -> dict:
        """Everything that makes the segment: tensors and plain values, for saving."""
        return dict(self.__dict__)

    @classmethod
    def from_state(cls, state: dict) -> Segment:
        """The segment that had this `state()`."""
        segment = cls.__new__(cls)
        segment.__dict__.update(state)
        return segment

    def rejoin(self, before: list[Segment]) -> None:  # noqa: B027 (most segments share nothing)
        """After loading: takes up again what it shares with a segment of the layer before, whose list this is."""

    def can_crop(self, tokens: int) -> bool:
        """Whether nothing was let go of that a token would see which came in place of the last `tokens` columns."""
        return True

    @abstractmethod
    def crop(self, tokens: int, real: torch.Tensor | None = None) -> None:
        """Forgets the last `tokens` columns taken in; the layer has checked that they are all still here.

        Args:
            real: int64 [batch] on the CPU, how many of these columns were tokens of each row and not padding; None =
                all. Of interest to a segment that does not store padding.
        """


def block_attention(step: Step, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Exact attention of a block's tokens among themselves, causal unless the step says otherwise.

    There may be fewer queries than tokens: then they are those of the last ones.
    """
    seen, m = _seen(step), step.q.shape[2]
    # torch's fused attention gives no log-sum-exp, knows no soft cap, and aligns fewer queries to the upper left.
    if need_lse or step.softcap is not None or m != step.k.shape[2]:
        return decode_attention(
            step.q, step.k, step.v, scale=step.scale, causal=seen is None, softcap=step.softcap,
            visible=None if seen is None else seen[:, -m:],
        )  # fmt: skip
    out = F.scaled_dot_product_attention(
        step.q, step.k, step.v, attn_mask=None if seen is None else seen[:, None], is_causal=seen is None and m > 1,
        scale=step.scale, enable_gqa=step.k.shape[1] != step.q.shape[1],
    )  # fmt: skip
    return out, None


def _seen(step: Step) -> torch.Tensor | None:
    """bool [batch or 1, m, m], which new token sees which, or None for plain causality."""
    if not step.padded:
        return step.visible
    m = step.k.shape[2]
    own = torch.eye(m, dtype=torch.bool, device=step.q.device)
    visible = own.new_ones(m, m).tril()[None] if step.visible is None else step.visible
    # A padding query sees itself, so that its row is not empty: an empty row would be NaN.
    return (visible & (step.positions >= 0)[:, None]) | own


def shown(positions: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    """Which slots hold a token that may be seen: bool like `positions` int32 [batch, heads or 1, n]."""
    real = positions >= 0
    if hidden is None or not hidden.shape[1]:
        return real
    # A hole has no position to look up; it is ruled out by `real` below.
    at = positions.long().clamp(min=0)
    known = at < hidden.shape[1]
    table = hidden[:, None].expand(-1, positions.shape[1], -1)
    return real & ~(table.gather(-1, at.clamp(max=hidden.shape[1] - 1)) & known)


def turned_slots(keys: torch.Tensor, positions: torch.Tensor, delta: torch.Tensor, rotary: RotarySpec) -> torch.Tensor:
    """Keys [batch, heads, n, head_dim] at logical positions [batch, heads or 1, n], turned as `Segment.turn` says."""
    at = positions.long().expand(keys.shape[:3])
    by = delta[:, None].expand(-1, at.shape[1], -1).gather(-1, at.clamp(0, delta.shape[1] - 1))
    by = by.masked_fill((at < 0) | (at >= delta.shape[1]), 0)
    return rotary.turn(keys.flatten(0, 1)[:, None], by.flatten(0, 1)).view_as(keys)


def attend_stored(
    held: Stored, q: torch.Tensor, scale: float, softcap: float | None, hidden: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a look at what is stored: for segments whose own kernel knows no mask, when there is one."""
    return decode_attention(
        q, held.keys, held.values, scale=scale, softcap=softcap, valid=shown(held.positions, hidden)
    )


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes that the tensors' storages hold, each storage once: views and slack count as what they keep alive."""
    # By address: tensors that share a storage, and slack behind a view, are counted as what they really cost.
    storages = [t.untyped_storage() for t in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def compact_storage(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied only if it is a view that keeps a larger storage alive (fused projections, padded buffers)."""
    if x.untyped_storage().nbytes() > x.numel() * x.element_size():
        return x.clone(memory_format=torch.contiguous_format)
    return x


def keep_across(segments: list[Segment], index: torch.Tensor) -> list[Segment]:
    """`Segment.keep` over segments that lie side by side: slots count through all of them.

    Returns:
        Those that still hold a token or stay without, and the last one, which takes new tokens in.
    """
    if len(segments) == 1:
        segments[0].keep(index)
        return segments
    kept, first = [], 0
    for segment in segments:
        if not segment.tensors():  # nothing ever came to it
            kept.append(segment)
            continue
        size = segment.held_positions().shape[2]
        inside = (index >= first) & (index < first + size)
        own, most = (index - first).masked_fill(~inside, -1), int(inside.sum(-1).max()) if inside.numel() else 0
        if most < own.shape[-1]:
            # Rows that keep fewer of the segments before start earlier: each closes up by itself, holes first, so that
            # the newest tokens of all rows stand in the last columns, where `crop` takes them.
            own = own.gather(-1, inside.sort(dim=-1, stable=True).indices[..., own.shape[-1] - most :])
        # A segment that keeps all its slots is left alone: packed tokens must not be rounded for nothing.
        if most < size or bool((own < 0).any()):
            segment.keep(own)
        if segment is segments[-1] or most or segment.stays:
            kept.append(segment)
        first += size
    return kept


def joined_states(segments: list[Segment]) -> dict:
    """The `state()` of a segment that is made of others: theirs by "number.name", their kinds in order as "kinds"."""
    state: dict = {"kinds": [segment.name for segment in segments]}
    for i, segment in enumerate(segments):
        state |= {f"{i}.{name}": x for name, x in segment.state().items()}
    return state


def parted_states(state: dict, extra: tuple[str, ...] = ()) -> list[Segment]:
    """The segments whose states were joined.

    Args:
        extra: names of what the whole noted as "number.name" beside the states: no part is given these.
    """
    parts = []
    for i, kind in enumerate(state["kinds"]):
        own = {name.removeprefix(f"{i}."): x for name, x in state.items() if name.startswith(f"{i}.")}
        # Names tell which class reads a part back.
        parts.append(SEGMENTS.find(kind).from_state({name: x for name, x in own.items() if name not in extra}))
    return parts


def index_of(mask: torch.Tensor) -> torch.Tensor:
    """The slots where bool [batch, heads, n] is True: int64 [batch, heads, c], each head's own first, then -1."""
    rank = mask.cumsum(-1) - 1
    row, head, slot = mask.nonzero(as_tuple=True)  # in order already: a sort would cost more
    index = rank.new_full((*mask.shape[:2], int(rank[..., -1:].max()) + 1 if rank.numel() else 0), -1)
    index[row, head, rank[row, head, slot]] = slot
    return index


def picked(held: Stored, mask: torch.Tensor) -> Stored:
    """The tokens where bool [batch, heads, n] is True, first in each head; what a head has not is 0, position -1. A
    copy."""
    index = index_of(mask)
    missing, index = index < 0, index.clamp(min=0)
    rows = index[..., None].expand(*index.shape, held.keys.shape[3])
    keys, values = (x.gather(2, rows).masked_fill_(missing[..., None], 0) for x in (held.keys, held.values))
    return Stored(keys, values, held.positions.gather(2, index).masked_fill(missing, -1))
