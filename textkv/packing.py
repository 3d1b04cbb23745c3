"""`Packer`: what every method that stores tokens as small integers does, alone or behind a method that evicts.

A prompt is read exactly. When its block ends, the method to the left of the `+` evicts as ever, and of what each head
keeps, the first whole multiple of `residual` tokens is packed; the rest stays exact in the last segment, the buffer.
Decoded tokens go to the buffer too, and each time a head has `residual` tokens there, these are packed. What is packed
stays as it is until the left method evicts again, in a later turn: then it goes by what the codes stand for.

Behind a `+` a packer takes prompt ends only: a scorer that also evicts while decoding does not do that here, as under
any wrapper (see `textkv.decode_eviction`), because tokens cannot leave a packed block one by one; and what it marked
down about tokens of earlier blocks is forgotten.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch

from textkv.centring import Centring, check_centring, find_centre, followed
from textkv.context import Context
from textkv.evidence import Evidence, Needs
from textkv.kernels.pack import Bits, Packed, channel_group, check_block
from textkv.layer import Layer
from textkv.method import Capabilities, Method
from textkv.segments.base import Segment, Stored
from textkv.segments.dense import DenseSegment
from textkv.segments.packed import PackedSegment
from textkv.segments.ragged import RaggedSegment
from textkv.segments.split import Part, SplitSegment
from textkv.segments.stack import StackSegment

_SAMPLE = 512  # tokens of a head on which the two are compared


@dataclass(frozen=True)
class Packer(Method):
    """Base of kivi and gear. A subclass says how tokens become blocks (`encode`).

    Attributes:
        bits: of a code: 2, 4 or 8 for integers, "fp8" for 8-bit floats.
        group: tokens that share a key scale in each channel, and make a block; a multiple of 16 up to 128.
        residual: tokens that are packed together, a multiple of `group`; fewer stay exact.
        channels: channels that share a value scale in each token; None = the largest divisor of head_dim up to 64.
        centre: what is subtracted from all packed keys of a head; the scores get it back exactly. Set when its first
            tokens are packed, from all that it holds then. "fixed": the mean of each channel, 4 * head_dim bytes a
            head; keys with a large constant part do not lose their differences to float16. "turned": the mean of the
            keys turned back by their positions, turned again for each key. A bias of the key projection (Qwen2,
            Qwen2.5) turns with the position as keys do: on fast frequencies it sweeps its whole size within a block,
            which a constant does not take away. 2 * R more bytes a head, for R rotary dims. Under M-RoPE a token's
            index does not tell how its keys are turned: 12 more a token for the cache, and for each layer with such
            heads (a token and head where each keeps its own). "auto": turned in the heads where that makes the ranges
            of keys in a block, hence the steps of codes, smaller by a quarter; fixed in the others, and where
            frequencies change with the length, so that nothing kept could tell how a key is turned. "none".
    """

    bits: Bits = 4
    group: int = 64
    residual: int = 64
    channels: int | None = None
    centre: Centring = "auto"

    wraps: ClassVar = "any"
    capabilities: ClassVar[Capabilities] = Capabilities(lossy=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block(self.bits, self.group, self.group)
        if self.residual < self.group or self.residual % self.group:
            near = max(1, round(self.residual / self.group)) * self.group
            raise ValueError(f"residual={self.residual} is no multiple of group={self.group}; use {near}")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"channels={self.channels}: a group needs at least 1 channel; None chooses by head_dim")
        check_centring(self.centre)
        if self.inner is not None:
            check_left(
                self.inner, self.name, "pack", "evicts or merges at every decoded token, and packed tokens cannot "
                "leave one by one; use a method that evicts at the end of the prompt, e.g. snapkv",
            )  # fmt: skip
            # A frozen dataclass: what is promised depends on what stands to the left.
            object.__setattr__(self, "capabilities", _behind(self.inner.capabilities))

    @abstractmethod
    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, counts: torch.Tensor, prompt: bool, heads: int = 1
    ) -> tuple[Packed, Packed]:
        """The blocks of the runs, run by run.

        Args:
            keys: fp32 [runs, n, head_dim], centred; a run is one KV head of one row.
            values: fp32 [runs, n, head_dim].
            counts: int64 [runs] on the CPU: the tokens of each run, multiples of `group`; the slots behind them hold 0.
            prompt: whether this is the end of a prompt block; else a full buffer of decoded tokens.
            heads: this many neighbouring runs are the heads of one row.
        """

    def needs(self) -> Needs:
        """What the method before it needs, and positions where the centre may turn."""
        return super().needs() | Needs(positions=self.centre in ("auto", "turned"))

    @property
    def looks_across(self) -> bool:
        """As the method before it: packing goes layer by layer."""
        return self.inner is not None and self.inner.looks_across

    @property
    def evicts(self) -> bool:
        """Only behind a method that does."""
        return self.inner is not None and self.inner.evicts

    def on_start(self, layer: Layer) -> None:
        """Check that groups and centre fit the model.

        Raises:
            ValueError: `channels` does not divide head_dim, or centre="turned" and no table tells how keys turn.
        """
        check_block(self.bits, self.group, layer.head_dim, self.channels or channel_group(layer.head_dim))
        followed(layer, self.centre, self.name)
        if self.inner is not None:
            self.inner.on_start(layer)

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Let the method before it act, then pack what is left, unless it acts again in `on_finish`."""
        if self.inner is not None:
            self.inner.on_prefill_end(layer, evidence)
        if not self._waits:
            self._flush(layer, prompt=True)

    def on_finish(self, context: Context) -> None:
        """Let the method before it act; if it waited for all layers, pack them now."""
        if self.inner is not None:
            self.inner.on_finish(context)
        if self._waits:
            for layer in context.layers:
                self._flush(layer, prompt=True)

    def on_decode_end(self, layer: Layer, query: torch.Tensor) -> None:
        """Pack the buffer when it is full."""
        self._flush(layer, prompt=False)

    @property
    def _waits(self) -> bool:
        """Whether the left method goes on changing layers after their own prompt end."""
        return self.inner is not None and type(self.inner).on_finish is not Method.on_finish

    def _flush(self, layer: Layer, prompt: bool) -> None:
        """Packs what has come together."""
        if prompt:
            # Numbers of the left method belong to slots that are about to be divided anew.
            layer.drop_token_statistics()
        if isinstance(layer.segments[0], SplitSegment):
            self._flush_heads(layer, prompt)
            return
        before = layer.since_eviction
        place = f"layer {layer.index}"
        segments = self._packed(layer, layer.segments, prompt, lambda row, head: f"{place}, row {row}, head {head}")
        if segments is not None:
            layer.replace(segments)
            layer.since_eviction = min(before, int(segments[-1].lengths().min()))

    def _flush_heads(self, layer: Layer, prompt: bool) -> None:
        """Packs the heads that keep everything; the others hold few tokens and drop them one by one."""
        for part in layer.segments[0].parts:
            segment = part.segment
            # A ring keeps a few tokens that change at every step: packing them would gain nothing.
            if not isinstance(segment, DenseSegment | StackSegment):
                continue
            inner = segment.segments if isinstance(segment, StackSegment) else [segment]
            packed = self._packed(layer, inner, prompt, partial(_unit_name, layer.index, part), part.row)
            if packed is not None:
                part.segment = StackSegment(packed)

    def _packed(
        self,
        layer: Layer,
        segments: list[Segment],
        prompt: bool,
        name: Callable[[int, int], str],
        rows: torch.Tensor | None = None,
    ) -> list[Segment] | None:
        """The segments with all whole multiples of `residual` tokens packed; None if no head has that many.

        Args:
            layer: whose they are.
            segments: a buffer, or packed tokens and a buffer.
            name: says which head of the model a row and head of the segments are.
            rows: int64 [batch], which row of the cache a row of the segments is; None = they are the same.

        Raises:
            ValueError: NaN or inf in what is to be packed, or values beyond float16.
        """
        packed, buffer = segments[0], segments[-1]
        # What nearly every decoded token finds; a rectangle knows its slots without a question to any tensor.
        if isinstance(buffer, DenseSegment) and buffer.used < self.residual:
            return None
        counts = buffer.lengths() // self.residual * self.residual
        if layer.came is not None:  # a row to which nothing came waits
            waits = layer.came == 0
            counts = counts.masked_fill((waits if rows is None else waits[rows.cpu()])[:, None], 0)
        # The common case while decoding, answered by lengths that the host knows.
        if not bool(counts.any()):
            return None
        held = buffer.stored()
        # Before anything is packed: afterwards NaN would be spread over a whole block.
        _check_values(held, name)
        taken, rotary = _first(held, counts), followed(layer, self.centre, self.name)
        if not isinstance(packed, PackedSegment):
            packed = PackedSegment(held.keys.dtype)
        # The first block of a head sets its centre for good: scores of all blocks must get the same one back.
        first = counts > 0 if packed.is_empty() else (counts > 0) & (packed.lengths() == 0)
        if bool(first.any()):
            sample = _first(held, counts.clamp(max=max(1, _SAMPLE // self.group) * self.group))
            centre = find_centre(self.centre, held, sample, rotary, rows, partial(_ranges, group=self.group))
            packed.set_centre(first, *centre, lambda positions: rotary.at(positions, rows))
        positions = taken.positions
        if bool((positions == positions[:, :1]).all()):
            # Shared by the heads where they agree: 4 bytes a token instead of 4 a token and head.
            positions = positions[:, :1]
        rope = None if packed.axes is None else rotary.at(positions, rows)
        centres = packed.centres(positions if rope is None else rope)
        # A hole becomes 0, the middle of the range, so that it widens no scale.
        keys = (taken.keys.float() - centres) * (positions >= 0)[..., None]
        keys, values = keys.flatten(0, 1), taken.values.float().flatten(0, 1)
        blocks = self.encode(keys, values, counts.view(-1), prompt, counts.shape[1])
        packed.take(*blocks, counts, positions, rope)
        return [packed, _rest(buffer, held, counts)]


def check_left(inner: Method, name: str, work: str, why: str) -> None:
    """Raises ValueError for a method to the left of `name` whose tokens cannot be taken over.

    Args:
        work: what `name` does to tokens, which goes once.
        why: what keeps it from a method that evicts at every token without scores, and what to use.
    """
    known = inner.capabilities
    if known.lossy:
        raise ValueError(f"{inner.name}+{name}: {inner.name} has changed what it stores already; {work} only once")
    if known.decode_eviction and not known.scores and not known.whole_heads:
        raise ValueError(f"{inner.name}+{name}: {inner.name} {why}+{name}")


def _behind(inner: Capabilities) -> Capabilities:
    """What a packer promises behind a method."""
    if inner.scores:  # its own decoding hooks do not run here
        inner = replace(inner, scores=False, decode_eviction=False, crop=True)
    return replace(inner, lossy=True, whole_heads=False)


def _unit_name(layer: int, part: Part, unit: int, _head: int) -> str:
    """Which head of the model a single-head row of a split segment's part is."""
    return f"layer {layer}, row {int(part.row[unit])}, head {int(part.head[unit])}"


def _ranges(keys: torch.Tensor, group: int) -> torch.Tensor:
    """What the codes of each head's keys [batch, heads, n, head_dim] have to span, all blocks and channels together."""
    blocks = keys.unflatten(2, (-1, group))
    return (blocks.amax(3) - blocks.amin(3)).sum((2, 3))


def _first(held: Stored, counts: torch.Tensor) -> Stored:
    """The first counts[b, h] tokens of each head, padded to one length: 0, position -1."""
    n, real = int(counts.max()), held.positions >= 0
    # A rectangle without holes is cut without a copy.
    if bool((counts == n).all()) and bool(real[..., :n].all()):
        return Stored(held.keys[:, :, :n], held.values[:, :, :n], held.positions[..., :n])
    order = (~real).sort(dim=-1, stable=True).indices[..., :n]
    inside = torch.arange(n, device=real.device) < counts.to(real.device)[..., None]
    pick = order[..., None].expand(*order.shape, held.keys.shape[-1])
    keys, values = (x.gather(2, pick).masked_fill(~inside[..., None], 0) for x in (held.keys, held.values))
    return Stored(keys, values, held.positions.gather(2, order).masked_fill(~inside, -1))


def _rest(buffer: Segment, held: Stored, counts: torch.Tensor) -> Segment:
    """A buffer of the same kind with all but the first counts[b, h] tokens of each head."""
    real = held.positions >= 0
    stays = real & (real.cumsum(-1) > counts.to(real.device)[..., None])
    left = stays.sum(-1)
    n = int(left.max())
    if isinstance(buffer, RaggedSegment):
        return RaggedSegment(held.keys[stays], held.values[stays], held.positions[stays], left.cpu())
    if n == 0:
        return DenseSegment.from_state(
            {
                "k": held.keys[:, :, :0].clone(), "v": held.values[:, :, :0].clone(),
                "positions": held.positions[:, :1, :0].clone(), "used": 0, "holes": False,
                "head_repeat": buffer.head_repeat,
            }
        )  # fmt: skip
    # The newest tokens last, holes before them: so that a crop takes tokens from every row.
    slots = stays.sort(dim=-1, stable=True).indices[..., -n:]
    index = slots.masked_fill(~stays.gather(-1, slots), -1)
    buffer.keep(index[:, : buffer.positions.shape[1]])
    return buffer


def _check_values(held: Stored, name: Callable[[int, int], str]) -> None:
    """Raise ValueError naming the first head whose keys or values cannot be packed."""
    hole = (held.positions < 0)[..., None]
    for what, x in (("keys", held.keys), ("values", held.values)):
        largest = x.abs().masked_fill(hole, 0).amax((2, 3)).float()
        bad = (~(largest <= torch.finfo(torch.float16).max)).nonzero()
        if len(bad):
            row, head = bad[0].tolist()
            size = float(largest[row, head])
            found = f"magnitudes up to {size:.3g}" if math.isfinite(size) else "NaN or inf"
            raise ValueError(f"{name(row, head)}: the {what} hold {found}, which cannot be packed (limit 65504)")
