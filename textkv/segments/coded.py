"""The coded segment: every token is a row of bytes of its own, for its key and for its value (TurboQuant).

A row is made when its token comes and never again (`kernels.codebook`), whatever comes or goes beside it. So tokens are
kept, dropped, cropped and moved one by one, as exact ones are: the rows lie in a dense or ragged segment, which only
sees narrower keys and values, and knows how to do all of that.

A forward's own tokens attend to one another exactly; later ones read their codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from textkv.kernels import coded_attention
from textkv.kernels.codebook import Fit, decode, encode, mark, turn_back
from textkv.positions import turned
from textkv.segments.base import SEGMENTS, Segment, Step, Stored, picked, register_segment, shown
from textkv.segments.dense import DenseSegment, fills_rectangle
from textkv.segments.ragged import RaggedSegment

_FEW = 16  # tokens up to which keys and values are coded in one go


@dataclass(frozen=True)
class Coding:
    """How the tokens of a segment are coded.

    Attributes:
        signs: int8 [2, head_dim] of 1 and -1: the random part of the rotation of keys, and of values.
        bits: of a key's codes, and of a value's.
        fit: how scales are chosen, see `kernels.codebook.encode`.
    """

    signs: torch.Tensor
    bits: tuple[int, int]
    fit: Fit


@register_segment("coded")
class CodedSegment(Segment):
    """See the module's docstring.

    Args:
        dtype: what `stored` gives back and the model computes in.
        coding: how tokens are coded.
        centre: fp32 [batch, heads, head_dim] that is subtracted from the keys that it makes shorter, or None. Their
            scores get it back.
        inv_freq: fp32 [batch, heads, R / 2], or None: the centre is turned first, by frequency times position of each
            key, as RoPE turns a bias.
        head_repeat: how many stored heads one incoming KV head becomes.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        coding: Coding,
        centre: torch.Tensor | None = None,
        inv_freq: torch.Tensor | None = None,
        head_repeat: int = 1,
    ) -> None:
        self.dtype, self.coding, self.centre, self.inv_freq = dtype, coding, centre, inv_freq
        self.head_repeat = head_repeat
        self.rows: DenseSegment | RaggedSegment = DenseSegment()

    stays = True  # signs and centre were fixed by a first prompt

    def take(self, held: Stored, ragged: bool) -> None:
        """Codes the first tokens: [batch, heads, n, ..], those with position -1 are none.

        Args:
            ragged: whether each head gets a region of its own length; else all get n slots.
        """
        positions = held.positions
        k, v = self._coded(held.keys, held.values, positions)
        if ragged:
            real = positions >= 0
            self.rows = RaggedSegment(k[real], v[real], positions[real], real.sum(-1).cpu())
            return
        if bool((positions == positions[:, :1]).all()):
            positions = positions[:, :1].clone()
        self.rows = DenseSegment.of(Stored(k, v, positions))

    def put(self, held: Stored, whole: bool = False) -> None:
        """Codes tokens that were in another segment, each head's own: [batch, heads, n, ..], position -1 is none.

        Args:
            whole: none of them is none; then nothing is asked of the device.
        """
        positions = held.positions
        padded = not whole and bool((positions < 0).any())
        k, v = self._coded(held.keys, held.values, positions, padded)
        if not (padded or self.rows.is_empty()) and isinstance(self.rows, DenseSegment):
            self.rows.put(Stored(k, v, positions))
            return
        # Heads take unequal numbers, or did before: all rows are laid out anew.
        mine = [] if self.rows.is_empty() else [self.rows.stored()]
        parts = [(x.keys, x.values, x.positions.expand(x.keys.shape[:3])) for x in (*mine, Stored(k, v, positions))]
        k, v, positions = (torch.cat(x, 2) for x in zip(*parts, strict=True))
        real = positions >= 0
        counts = real.sum(-1).cpu()
        if fills_rectangle(counts):
            self.rows = DenseSegment.of(picked(Stored(k, v, positions), real))
        else:
            self.rows = RaggedSegment(k[real], v[real], positions[real], counts)

    def _coded(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, padded: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of keys and values [batch, heads, n, head_dim] at positions [batch, heads or 1, n]; padding, of which
        there is none if not `padded`, is 0."""
        keys, values = keys.float(), values.float()
        real = (positions >= 0)[..., None] if padded else None
        if padded:
            keys, values = keys.where(real, 0), values.where(real, 0)
        if self.centre is None:
            return self._encoded(keys, values, None)
        # The first token's key is like no other, and most of the attention rests on it: what is far from the centre is
        # coded without, because an error is in proportion to the length of what is coded.
        moved = keys - self._centres(positions)
        if padded:
            moved = moved.where(real, 0)
        alone = torch.linalg.vector_norm(keys, dim=-1) < torch.linalg.vector_norm(moved, dim=-1)
        return self._encoded(torch.where(alone[..., None], keys, moved), values, alone)

    def _encoded(
        self, keys: torch.Tensor, values: torch.Tensor, marked: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of keys, of which some are `marked` bool [batch, heads, n], and of values."""
        signs, fit, (bits, value_bits) = self.coding.signs, self.coding.fit, self.coding.bits
        if bits != value_bits or keys.shape[2] > _FEW:
            return encode(keys, signs[0], bits, fit, marked), encode(values, signs[1], value_bits, fit)
        # Of few tokens the number of operations is what counts: keys and values go together.
        both = torch.stack([keys, values])
        k, v = encode(both, signs.view(2, 1, 1, 1, -1), bits, fit).unbind(0)
        if marked is not None:
            mark(k, marked)
        return k, v

    def _centres(self, positions: torch.Tensor) -> torch.Tensor:
        """The centre for keys at `positions` [batch, heads or 1, n]: fp32 [batch, heads, n or 1, head_dim]."""
        centre = self.centre[:, :, None]
        return centre if self.inv_freq is None else turned(centre, positions, self.inv_freq)

    def extend(self, step: Step, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The forward's own tokens see one another exactly, and older ones by their codes."""
        result = self.read(step, need_lse)
        self.append(step)
        return result

    def read(self, step: Step, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As any segment's; a single token is one more in the softmax over the codes."""
        if step.k.shape[2] > 1 or step.q.shape[2] > 1 or step.padded or step.visible is not None or self.is_empty():
            return super().read(step, need_lse)
        return self._attend(step.q, step.scale, step.softcap, step.hidden, self._heads(step), need_lse)

    def append(self, step: Step) -> None:
        """Codes the new tokens, one row of bytes for each key and each value; padding becomes a row of zeros."""
        k, v = self._coded(*self._heads(step), step.positions[:, None], step.padded)
        self.rows.append(replace(step, k=k, v=v))

    def _heads(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """The new keys and values of the stored heads, [batch, heads, m, head_dim]."""
        if self.head_repeat == 1:
            return step.k, step.v
        return step.k.repeat_interleave(self.head_repeat, dim=1), step.v.repeat_interleave(self.head_repeat, dim=1)

    def attend(
        self, q: torch.Tensor, scale: float, *, softcap: float | None = None, hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of q [batch, heads, m, head_dim] over all tokens, which are read as codes: out like q, and lse fp32
        [batch, heads, m]."""
        return self._attend(q, scale, softcap, hidden)

    def _attend(
        self,
        q: torch.Tensor,
        scale: float,
        softcap: float | None,
        hidden: torch.Tensor | None,
        beside=None,
        need_lse: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`attend`, with exact keys and values [batch, heads, r, head_dim] beside the codes."""
        rows = self.rows.stored()
        whole = hidden is None and isinstance(self.rows, DenseSegment) and not self.rows.holes
        return coded_attention(
            q, rows.keys, rows.values, bits=self.coding.bits, signs=self.coding.signs, scale=scale, centre=self.centre,
            inv_freq=self.inv_freq, positions=None if self.inv_freq is None else rows.positions.contiguous(),
            softcap=softcap, valid=None if whole else shown(rows.positions, hidden), beside=beside, need_lse=need_lse,
        )  # fmt: skip

    def stored(self) -> Stored:
        """What the rows stand for, for scoring and for moving elsewhere: as large as if it had never been coded."""
        rows, dim, parts = self.rows.stored(), self.coding.signs.shape[-1], []
        if not rows.keys.shape[2]:
            none = rows.keys.new_zeros((*rows.keys.shape[:3], dim), dtype=self.dtype)
            return Stored(none, none, rows.positions)
        for x, signs, bits in zip((rows.keys, rows.values), self.coding.signs, self.coding.bits, strict=True):
            c, size = decode(x, bits, dim)
            parts.append(turn_back(c * size.abs()[..., None], signs))
            if self.centre is not None and len(parts) == 1:
                parts[0] += self._centres(rows.positions) * ~size[..., None].signbit()
        return Stored(*(x.to(self.dtype) for x in parts), rows.positions)

    def keep(self, index: torch.Tensor) -> None:
        """Moves rows of bytes: nothing is decoded, and nothing is rounded again."""
        if index.shape[-1]:
            self.rows.keep(index)
        elif not self.is_empty():
            held = self.rows.stored()
            # Copies: a view of nothing would keep all bytes alive.
            self.rows = DenseSegment.of(
                Stored(*(x[:, :, :0].clone() for x in (held.keys, held.values, held.positions)))
            )

    def keep_mask(self, mask: torch.Tensor) -> Segment:
        """Rows of heads that keep different numbers become ragged; the segment stays this one."""
        self.rows = self.rows.keep_mask(mask)
        return self

    def held_positions(self) -> torch.Tensor:
        """Positions of the rows, holes included; no code is read."""
        return self.rows.held_positions()

    def lengths(self) -> torch.Tensor:
        """Rows that hold a token, for each head."""
        return self.rows.lengths()

    def is_empty(self) -> bool:
        """Whether no row has been made yet."""
        return self.rows.is_empty()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor held: rows "k" and "v" with their positions, signs, and what was subtracted from keys."""
        own = {"signs": self.coding.signs, "centre": self.centre, "inv_freq": self.inv_freq}
        return self.rows.tensors() | {name: x for name, x in own.items() if x is not None}

    def take_rows(self, rows: torch.Tensor) -> None:
        """Rearranges rows of bytes and centres; signs are the layer's, the same for all."""
        self.rows.take_rows(rows)
        self.centre, self.inv_freq = (
            None if x is None else x.index_select(0, rows.to(x.device)) for x in (self.centre, self.inv_freq)
        )

    def can_crop(self, tokens: int) -> bool:
        """As the segment of rows says: rows are independent of one another."""
        return self.rows.can_crop(tokens)

    def crop(self, tokens: int, real: torch.Tensor | None = None) -> None:
        """Drops the last rows; no other row depends on them."""
        self.rows.crop(tokens, real)

    def state(self) -> dict:
        """Rows and centres as tensors; bits, fit and the kind of segment that holds the rows as plain values."""
        own = {"signs": self.coding.signs, "centre": self.centre, "inv_freq": self.inv_freq}
        plain = {
            "dtype": str(self.dtype).removeprefix("torch."), "bits": list(self.coding.bits), "fit": self.coding.fit,
            "head_repeat": self.head_repeat, "kind": self.rows.name,
        }  # fmt: skip
        return plain | own | {f"rows.{name}": x for name, x in self.rows.state().items()}

    @classmethod
    def from_state(cls, state: dict) -> CodedSegment:
        """The segment that had this `state()`, with the same signs: the same bits are read."""
        coding = Coding(state["signs"], tuple(state["bits"]), state["fit"])
        centre, inv_freq = state.get("centre"), state.get("inv_freq")
        segment = cls(getattr(torch, state["dtype"]), coding, centre, inv_freq, state["head_repeat"])
        rows = {name.removeprefix("rows."): x for name, x in state.items() if name.startswith("rows.")}
        segment.rows = SEGMENTS.find(state["kind"]).from_state(rows)
        return segment
