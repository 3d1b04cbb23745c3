"""The paired segment: tokens of two neighbouring layers, stored once (MiniCache, arXiv 2405.14366).

A `Pair` holds, for keys and for values, one direction per token and KV head, a length per layer, and both exact vectors
of the few tokens whose layers point apart. Each layer has a `PairedSegment` that looks at the pair from its side. The
earlier layer tells the bytes of what both share, each layer those of its lengths and exact vectors.

Attention restores at most BLOCK tokens at a time and merges the parts: a whole layer is never rebuilt. Every step reads
the directions twice, once per layer, so what is won is room, not bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from textkv.kernels import decode_attention, merge
from textkv.kernels.pack import Bits
from textkv.segments.base import Segment, Step, Stored, register_segment, shown
from textkv.segments.dense import DenseSegment
from textkv.segments.directions import Directions, plain, store
from textkv.slerp import Extent, Retention, slerp

BLOCK = 1024
"""Tokens restored at a time, at most: bounds a step's memory; on a GPU each block costs a few launches."""


@dataclass(frozen=True)
class Merging:
    """How a pair merges.

    Attributes:
        t: place of the shared direction on the arc from the earlier layer's (0) to the later's (1).
        retention: which tokens stay exact.
        sinks: the first tokens, which always do: they often point opposite ways in neighbouring layers. They are out of
            the range that `retention` looks at.
        bits: of the stored directions, as `kernels.pack` knows them; 16 = as they are, in the model's dtype.
        group: tokens that are packed together; of no meaning for 16 bits.
    """

    t: float
    retention: Retention
    sinks: int
    bits: Bits | Literal[16] = 16
    group: int = 32

    @property
    def unit(self) -> int:
        """Tokens are merged in multiples of this number."""
        return 1 if self.bits == 16 else self.group


@dataclass
class Block:
    """Some tokens of a pair: positions int32 [batch, 1 or kv_heads, c], -1 = hole; `holes`: whether there may be any
    (known on the host, so that a step need not wait for the device)."""

    keys: Directions
    values: Directions
    positions: torch.Tensor
    holes: bool

    def joined(self, other: Block) -> Block:
        """This block and, behind it, another."""
        width = max(self.positions.shape[1], other.positions.shape[1])
        at = torch.cat([x.positions.expand(-1, width, -1) for x in (self, other)], 2)
        keys, values = self.keys.joined(other.keys), self.values.joined(other.values)
        return Block(keys, values, at, self.holes or other.holes)

    def valid(self, hidden: torch.Tensor | None = None) -> torch.Tensor | None:
        """Where tokens are that may be seen, bool [batch, c] or [batch, kv_heads, c]; None = everywhere."""
        if not self.holes and hidden is None:
            return None
        real = shown(self.positions, hidden)
        return real[:, 0] if real.shape[1] == 1 else real

    def keep(self, index: torch.Tensor) -> bool:
        """Keeps tokens `index` int64 [batch, 1 or kv_heads, c], -1 = hole; returns whether any is left. Codes of packed
        directions stay until the whole block is empty."""
        heads = self.keys.sizes[0].shape[1]
        if not bool((index >= 0).any()):
            return False
        if not self.keys.packed:
            for half in (self.keys, self.values):
                half.keep(index.expand(-1, heads, -1))
            at = self.positions.expand(-1, index.shape[1], -1) if self.positions.shape[1] == 1 else self.positions
            pick = index.expand(-1, at.shape[1], -1)
            self.positions = at.gather(-1, pick.clamp(min=0)).masked_fill(pick < 0, -1)
        else:
            width = max(index.shape[1], self.positions.shape[1])
            at, pick = (x.expand(-1, width, -1) for x in (self.positions, index))
            stays = torch.zeros(*at.shape[:2], at.shape[2] + 1, dtype=torch.bool, device=at.device)
            stays = stays.scatter(-1, pick.masked_fill(pick < 0, at.shape[2]), True)[..., :-1]
            self.positions = at.masked_fill(~stays, -1)
        self.holes = bool((self.positions < 0).any())
        return True

    def take_rows(self, rows: torch.Tensor) -> None:
        """Rearranges the batch."""
        self.keys.take_rows(rows)
        self.values.take_rows(rows)
        self.positions = self.positions[rows]


class Pair:
    """What two layers share. What was merged is never merged again; small blocks are put together while BLOCK allows.

    Args:
        layers: numbers of the two layers, the earlier first.
        like: keys [batch, kv_heads, .., head_dim] of one of them.

    Attributes:
        extents: of the distances of keys and of values, which go on over later blocks.
    """

    def __init__(self, layers: tuple[int, int], like: torch.Tensor) -> None:
        self.layers = layers
        self.blocks: list[Block] = []
        self.waiting: dict[int, torch.Tensor] = {}
        # An empty range: the first distance makes it one.
        low = torch.full(like.shape[:2], torch.inf, dtype=torch.float32, device=like.device)
        self.extents = {name: Extent(low.clone(), -low) for name in ("keys", "values")}

    def absorb(self, layers: tuple[DenseSegment, DenseSegment], slots: torch.Tensor, how: Merging) -> None:
        """Merges slots int64 [batch, 1 or kv_heads, c] (-1 = hole) of two layers that hold the same tokens; both still
        hold them afterwards. Each region has a multiple of `how.unit` tokens and its holes last.

        Raises:
            ValueError: a key or value that is not finite; names layer and KV head.
        """
        # Pieces bound what is in fp32 at a time; a block's end must not cut a packed group.
        pieces = slots.split(BLOCK // how.unit * how.unit, -1)
        keys, values = (self._halves(layers, name, pieces, how) for name in ("keys", "values"))
        for *halves, piece in zip(keys, values, pieces, strict=True):
            at = _at(layers[0], piece)
            block = Block(*halves, at, bool((at < 0).any()))
            # Each block costs a decoded token a call of its own: small ones are put together.
            if self.blocks and self.blocks[-1].positions.shape[-1] + piece.shape[-1] <= BLOCK:
                block = self.blocks.pop().joined(block)
            self.blocks.append(block)

    def _halves(
        self,
        layers: tuple[DenseSegment, DenseSegment],
        name: str,
        pieces: tuple[torch.Tensor, ...],
        how: Merging,
    ) -> list[Directions]:
        """Keys or values of all pieces; what is kept exactly is decided over all of them at once."""
        shared = []
        for piece in pieces:
            both = [_picked(layer, name, piece) for layer in layers]
            self._check_finite(name, both)
            arc = slerp(*both, how.t)
            unit = store(arc.direction, both[0].dtype, how.bits, how.group, "channel" if name == "keys" else "token")
            # Sizes are fitted to the direction as it is stored, rounded: so lengths come out exact even at 2 bits.
            length = plain(unit, arc.distance.shape).norm(dim=-1).clamp(min=1e-30)
            # bfloat16 has too few digits for a factor on a whole vector.
            kind = torch.float32 if both[0].dtype == torch.float32 else torch.float16
            shared.append((unit, tuple((size / length).to(kind) for size in arc.sizes), arc.distance))
        # Which vectors are unlike is relative to the others: it is decided when all distances are known.
        kept = self._kept(layers[0], name, pieces, torch.cat([x[2] for x in shared], -1), how)
        halves = []
        for (unit, sizes, _), piece, mask in zip(shared, pieces, kept.split(pieces[0].shape[-1], -1), strict=True):
            exact = tuple(_picked(layer, name, piece)[mask] for layer in layers)
            halves.append(Directions(unit, sizes, mask.flatten().nonzero()[:, 0].int(), exact))
        return halves

    def _kept(
        self, layer: DenseSegment, name: str, pieces: tuple[torch.Tensor, ...], distance: torch.Tensor, how: Merging
    ) -> torch.Tensor:
        """Which vectors stay exact: bool [batch, kv_heads, c of all pieces]."""
        positions = torch.cat([_at(layer, piece) for piece in pieces], -1).expand_as(distance)
        sink = (positions >= 0) & (positions < how.sinks)
        decide = (positions >= 0) & ~sink
        self.extents[name] = self.extents[name].widened(distance, decide)
        return sink | how.retention.dissimilar(distance, decide, self.extents[name])

    def _check_finite(self, name: str, both: list[torch.Tensor]) -> None:
        for layer, x in zip(self.layers, both, strict=True):
            # Lengths are stored in float16, and NaN and inf show in a length too.
            bad = ~(x.float().norm(dim=-1) <= torch.finfo(torch.float16).max).all(-1)
            if bool(bad.any()):
                head = int(bad.any(0).nonzero()[0, 0])
                raise ValueError(
                    f"layer {layer}, KV head {head}: the {name} hold NaN, inf or vectors longer than 65504"
                )

    def keep(self, index: torch.Tensor, side: int) -> None:
        """Keeps slots `index` for one layer; nothing goes before the other layer has said the same.

        Raises:
            ValueError: the two layers keep different tokens.
        """
        self.waiting[side] = index
        # Layers are told one after the other, and neither may lose what the other still reads.
        if len(self.waiting) < 2:
            return
        own, other = self.waiting[0], self.waiting[1]
        self.waiting = {}
        if own.shape[2] != other.shape[2] or bool((own != other).any()):
            raise ValueError(
                f"layers {self.layers[0]} and {self.layers[1]} share their tokens and must keep the same ones"
            )
        first, kept = 0, []
        for block in self.blocks:
            size = block.positions.shape[-1]
            inside = (own >= first) & (own < first + size)
            part = (own - first).masked_fill(~inside, -1)
            if block.keep(part[..., inside.flatten(0, 1).any(0)]):
                kept.append(block)
            first += size
        self.blocks = kept

    def take_rows(self, rows: torch.Tensor) -> None:
        """Rearranges the batch."""
        for block in self.blocks:
            block.take_rows(rows)
        self.extents = {name: Extent(x.low[rows], x.high[rows]) for name, x in self.extents.items()}

    def tensors(self, side: int) -> dict[str, torch.Tensor]:
        """What one layer answers for."""
        held = {}
        for i, block in enumerate(self.blocks):
            for name in ("keys", "values"):
                held |= {f"{i}.{name}.{part}": x for part, x in getattr(block, name).tensors(side).items()}
            if side == 0:
                held[f"{i}.positions"] = block.positions
        if side == 0:
            held |= {f"{name}.{end}": getattr(x, end) for name, x in self.extents.items() for end in ("low", "high")}
        return held

    @classmethod
    def from_tensors(
        cls, held: dict[str, torch.Tensor], layers: tuple[int, int], bits: list[Bits | Literal[16]]
    ) -> Pair:
        """The pair whose two sides told these tensors; `bits` of each block."""
        pair = cls.__new__(cls)
        pair.layers, pair.waiting = layers, {}
        pair.extents = {name: Extent(held[f"{name}.low"], held[f"{name}.high"]) for name in ("keys", "values")}
        pair.blocks = []
        for i, of_block in enumerate(bits):
            own = [
                {key.removeprefix(at): x for key, x in held.items() if key.startswith(at)}
                for at in (f"{i}.keys.", f"{i}.values.")
            ]
            halves = [Directions.from_tensors(x, of_block) for x in own]
            at = held[f"{i}.positions"]
            pair.blocks.append(Block(*halves, at, bool((at < 0).any())))
        return pair


@register_segment("paired")
class PairedSegment(Segment):
    """A pair seen from one of its layers: `side` 0 is the earlier layer, 1 the later.

    Rearranging the batch through side 0 rearranges the pair for both, and saving side 0 saves it for both: a cache does
    either to all of its layers.
    """

    def __init__(self, pair: Pair | None, side: int) -> None:
        self.pair, self.side = pair, side

    def append(self, step: Step) -> None:
        """Raises RuntimeError: tokens of both layers come by `Pair.absorb`."""
        raise RuntimeError("a pair takes tokens from both layers at once (`Pair.absorb`), never from one")

    def is_empty(self) -> bool:
        """Whether the pair has no block, the same from both sides."""
        return not self.pair.blocks

    def attend(
        self, q: torch.Tensor, scale: float, *, softcap: float | None = None, hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Restores this layer's keys and values at most BLOCK tokens at a time, and merges the parts."""
        parts = []
        for block in self.pair.blocks:
            keys, values = block.keys.restored(self.side), block.values.restored(self.side)
            parts.append(decode_attention(q, keys, values, scale=scale, valid=block.valid(hidden), softcap=softcap))
        return parts[0] if len(parts) == 1 else merge([out for out, _ in parts], [lse for _, lse in parts])

    def keep(self, index: torch.Tensor) -> None:
        """Notes what this layer keeps; the pair acts when the other layer has said the same.

        Raises:
            ValueError: the other layer, told before, keeps other tokens.
        """
        self.pair.keep(index, self.side)

    def stored(self) -> Stored:
        """This layer's keys and values restored as a whole: as large as if they had not been merged."""
        keys = torch.cat([block.keys.restored(self.side) for block in self.pair.blocks], 2)
        values = torch.cat([block.values.restored(self.side) for block in self.pair.blocks], 2)
        return Stored(keys, values, self.held_positions())

    def held_positions(self) -> torch.Tensor:
        """int32 [batch, kv_heads, n], one block behind the other; the same from both sides."""
        heads = self.pair.blocks[0].keys.sizes[0].shape[1]
        return torch.cat([block.positions.expand(-1, heads, -1) for block in self.pair.blocks], 2)

    def lengths(self) -> torch.Tensor:
        """Counted on the device; the same from both sides."""
        return (self.held_positions() >= 0).sum(-1).cpu()

    def tensors(self) -> dict[str, torch.Tensor]:
        """This layer's lengths and exact vectors; from side 0 also directions, positions and extents."""
        return self.pair.tensors(self.side)

    def take_rows(self, rows: torch.Tensor) -> None:
        """Rearranges the pair from side 0; does nothing from side 1."""
        if self.side == 0:
            self.pair.take_rows(rows.to(self.pair.blocks[0].positions.device))

    def crop(self, tokens: int, real: torch.Tensor | None = None) -> None:
        """Raises ValueError unless `tokens` is 0."""
        if tokens:
            raise ValueError(f"{tokens} merged tokens cannot be taken back, only tokens that are still exact")

    def state(self) -> dict:
        """From side 0 the tensors of both sides, layer numbers and bits of each block; from side 1 its side."""
        if self.side == 1:
            # The pair is saved once, by its first layer.
            return {"side": 1}
        bits = [getattr(block.keys.unit, "bits", 16) for block in self.pair.blocks]
        return self.pair.tensors(0) | self.pair.tensors(1) | {"side": 0, "layers": self.pair.layers, "bits": bits}

    @classmethod
    def from_state(cls, state: dict) -> PairedSegment:
        """The segment with its pair; for side 1 without one, which `rejoin` then finds."""
        if state["side"] == 1:
            return cls(None, 1)  # `rejoin` finds its pair
        return cls(Pair.from_tensors(state, tuple(state["layers"]), state["bits"]), 0)

    def rejoin(self, before: list[Segment]) -> None:
        """Side 1 takes the pair of the layer before. Raises ValueError if side 0 is not in the list."""
        if self.side == 0:
            return
        pairs = [x.pair for x in before if isinstance(x, PairedSegment) and x.side == 0]
        if not pairs:
            kinds = ", ".join(x.name for x in before) or "nothing"
            raise ValueError(f"a layer is the second of a pair, and the one before it holds {kinds}; load both layers")
        self.pair = pairs[0]


def _at(layer: DenseSegment, slots: torch.Tensor) -> torch.Tensor:
    """Positions int32 [batch, 1 or kv_heads, c] of slots, -1 at holes."""
    positions = layer.positions[..., : layer.used].expand(-1, slots.shape[1], -1)
    return positions.gather(-1, slots.clamp(min=0)).masked_fill(slots < 0, -1)


def _picked(layer: DenseSegment, name: str, slots: torch.Tensor) -> torch.Tensor:
    """Keys or values [batch, kv_heads, c, head_dim] of slots, 0 at holes."""
    x = getattr(layer.stored(), name)
    index = slots[..., None].expand(-1, x.shape[1], -1, x.shape[-1])
    return x.gather(2, index.clamp(min=0)).masked_fill(index < 0, 0)
