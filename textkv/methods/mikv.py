"""MiKV: what an eviction method would drop is kept with few bits (arXiv 2402.18096).

Wraps any scorer ("snapkv+mikv(16,2)"; alone it wraps h2o, the paper's score). The scorer works as if it were alone, at
the end of prompts and, if it evicts there, while decoding. The tokens that it drops are not lost but demoted to codes.
Demotion is final, the exact values are gone.

The budget is the share r of exact tokens: at one budget a scorer with and without mikv holds the same tokens exactly,
so that what is won by demoting instead of dropping can be read off. r = 1 is the full cache, `mikv(16,0)` the scorer.
The paper lets the exact share grow with the text (`grow=True`); by default it is fixed by the prompt, as every share.
No code was released.

The paper's codes are `codes="scaled"`: groups of channels share a scale in each token, keys are balanced against
queries (`textkv.segments.balanced`). They come in blocks of `block` tokens of a head; demoted tokens wait, exact, until
they fill one. Ours is the centring of keys, without which a balanced channel with a large constant part is worse than
an unbalanced. At two bits these codes lose more than dropping does (SmolLM2: errors of attention outputs of .19 where
h2o's are .15, at a quarter), so below four bits tokens are coded as TurboQuant does, `codes="turned"`
(`textkv.segments.coded`; .06): smaller, one by one, nothing waits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch

from textkv.context import Context
from textkv.decode_eviction import DecodeEviction, attention_row
from textkv.evidence import Evidence, Needs
from textkv.kernels.codebook import check_bits
from textkv.kernels.pack import channel_group, check_block, pack
from textkv.layer import Layer
from textkv.method import Capabilities, Method, register
from textkv.methods.h2o import H2O
from textkv.methods.turboquant import TurboQuant, check_codable
from textkv.segments.balanced import BalancedSegment
from textkv.segments.base import Segment, Stored, picked
from textkv.segments.block_pool import blocks_of
from textkv.segments.coded import CodedSegment
from textkv.segments.dense import DenseSegment
from textkv.segments.ragged import RaggedSegment

Codes = Literal["turned", "scaled"]
_BLOCK = 16  # tokens; more of them wait


@register("mikv")
@dataclass(frozen=True)
class MiKV(Method):
    """Demotes where its scorer evicts. A layer is [turned if any, exact] or [scaled, waiting if any, exact].

    Attributes:
        high: bits of the important tokens: 16, as they are.
        low: bits of the others, 1 to 8 turned; 2, 4, 8 or "fp8" (8-bit floats) scaled; 0 drops them.
        codes: "turned" or "scaled"; None = scaled at 4 and 8 bits, and where one of the next three says how.
        group: scaled: neighbouring channels that share a scale in each token; None = the largest divisor of head_dim up
            to 64 (64 of 128 in the paper: low + 0.5 bits per element).
        block: scaled: demoted tokens of a head that are packed together, a multiple of 16 (None = 16); fewer wait.
        balance: scaled: whether key channels are balanced against query channels (None = they are).
        grow: under a scorer that evicts while decoding and a budget that is a share, the number of exact tokens follows
            the tokens seen (the paper); False = it stays what it was at the end of the prompt.

    Raises:
        ValueError: bits, block or group that cannot be packed, a setting of scaled codes for turned ones, or a scorer
            that stores a copy per query head.
    """

    high: int = 16
    low: int | Literal["fp8"] = 2
    group: int | None = None
    block: int | None = None
    balance: bool | None = None
    grow: bool = False
    codes: Codes | None = None

    wraps: ClassVar = "scorer"
    capabilities: ClassVar[Capabilities] = Capabilities(lossy=True)

    def __post_init__(self) -> None:
        if self.inner is None:
            object.__setattr__(self, "inner", H2O(budget=self.budget))
        super().__post_init__()
        if self.high != 16:
            raise ValueError(
                f"high={self.high}: important tokens are stored as they are; use 16 (packed ones could not be demoted "
                "without rounding twice)"
            )
        self._check_codes()
        known = self.inner.capabilities
        if known.stores_query_heads:
            raise ValueError(
                f"{self.inner.name}+{self.name}: {self.inner.name} stores a copy per query head, of which nothing can "
                "be demoted; use a scorer that selects per KV head, e.g. snapkv or gui-kv"
            )
        # No scores for wrappers: what they dropped would not be demoted.
        object.__setattr__(self, "capabilities", replace(known, scores=False, lossy=bool(self.low)))

    def _check_codes(self) -> None:
        """Raise ValueError for codes that cannot be."""
        if self.low != "fp8" and (not isinstance(self.low, int) or isinstance(self.low, bool) or self.low < 0):
            raise ValueError(f"low={self.low!r} is no number of bits; use 1 to 8, 'fp8', or 0 to drop")
        if self.codes not in (None, *get_args(Codes)):
            raise ValueError(f"codes={self.codes!r} is not known; use 'turned' or 'scaled'")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group={self.group}: a group needs at least 1 channel; None chooses by head_dim")
        told = {name: getattr(self, name) for name in _OF_SCALES if getattr(self, name) is not None}
        if told and self.codes == "turned":
            said = ", ".join(f"{name}={value}" for name, value in told.items())
            raise ValueError(f"{said}: turned codes have no scales to share; use codes='scaled'")
        if not self.low and (told or self.codes):
            raise ValueError("low=0 drops what is unimportant: there are no codes to say anything of")
        if self.scaled:
            check_block(self.low, self.waits, self.waits)
        elif self.low:
            check_bits(self.low)

    @property
    def scaled(self) -> bool:
        """Whether what is demoted has the paper's codes."""
        if not self.low or self.codes:
            return bool(self.low) and self.codes == "scaled"
        told = any(getattr(self, name) is not None for name in _OF_SCALES)
        return told or self.low in (4, 8, "fp8")

    @property
    def waits(self) -> int:
        """Scaled: demoted tokens of a head that are packed together."""
        return _BLOCK if self.block is None else self.block

    @property
    def _coder(self) -> TurboQuant:
        """Turned: what makes the segment of codes. Its centre is the mean of the keys, as that of scaled codes."""
        return TurboQuant(bits=self.low, centre="fixed", seed=1)

    @property
    def evicts(self) -> bool:
        """Only with low=0, where what is unimportant is dropped and not demoted."""
        return not self.low

    @property
    def counts_last(self) -> bool:
        """The scorer knows the exact tokens alone."""
        return bool(self.low)

    @property
    def budgeted(self) -> bool:
        """Always: the budget says how many tokens stay exact."""
        return True

    def needs(self) -> Needs:
        """What the scorer needs, and for scaled codes the largest queries per channel, which balance the keys."""
        return self.inner.needs() | Needs(query_peaks=self.scaled)

    # ---- the scorer's moments ----------------------------------------------------------------------------------

    def on_start(self, layer: Layer) -> None:
        """Check that the groups fit the model.

        Raises:
            ValueError: `group` does not divide head_dim.
        """
        if self.scaled:
            check_block(self.low, self.waits, layer.head_dim, self.group or channel_group(layer.head_dim))
        self.inner.on_start(layer)

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Fix balancer and centre by the first prompt, then let the scorer drop: what it drops is demoted."""
        if self.low and not isinstance(layer.segments[0], BalancedSegment | CodedSegment):
            # Fixed by the first prompt, as in the paper: codes that are stored cannot be balanced anew.
            held, peaks = layer.stored(), None if self.balance is False else evidence.peaks
            low = BalancedSegment.for_prompt(held, peaks) if self.scaled else self._coder.empty(layer, held)
            layer.segments = [low, *layer.segments]
        if evidence.columns is not None:
            # Columns are those of all stored tokens, packed ones first; the scorer sees the exact ones alone.
            exact = layer.segments[-1].held_positions().shape[-1]
            evidence = replace(evidence, columns=evidence.columns[..., evidence.columns.shape[-1] - exact :])
        with self._demoting(layer.context.layers[: layer.index + 1]):
            self.inner.on_prefill_end(layer, evidence)

    def on_decode_end(self, layer: Layer, query: torch.Tensor) -> None:
        """Demote what the scorer drops while decoding; its row of attention covers the packed tokens too."""
        if not self.inner.capabilities.decode_eviction:
            return
        if not self.low:
            self.inner.on_decode_end(layer, query)
            return
        if not isinstance(self.inner, DecodeEviction):
            with self._demoting(layer.context.layers):
                self.inner.on_decode_end(layer, query)
            return
        if self.inner.budget.is_full or self._demote_one(layer, query):
            return
        with self._demoting([layer]):
            self.inner.drop(layer, self._row(layer, query), self._counts(layer))

    def on_finish(self, context: Context) -> None:
        """Let a scorer that waits for all layers drop now: what it drops is demoted."""
        with self._demoting(context.layers):
            self.inner.on_finish(context)

    def _row(self, layer: Layer, query: torch.Tensor) -> torch.Tensor:
        """What a decoded token looked at of the exact tokens, which the layer shows alone."""
        if layer.last_row is not None:
            return layer.last_row
        if layer.last_share is None:
            return attention_row(layer, query)
        # Attention over exact tokens alone sums to 1; their part of the whole attention makes it what H2O adds up.
        return attention_row(layer, query, sinks=False) * layer.last_share

    def _demote_one(self, layer: Layer, query: torch.Tensor) -> bool:
        """The common case: a full rectangle of exact tokens, of which one is demoted for the one that came, and a
        rectangle of those that wait, if any do. Next to nothing is moved and nothing asked of the device. Returns
        whether it is that."""
        *demoted, exact = layer.segments
        if not (demoted and all(isinstance(x, DenseSegment) for x in (*demoted[1:], exact))):
            return False
        n, most = exact.slots, self.inner.budget.tokens
        if exact.holes or n < 2 or layer.came is not None or self.grow or not self.inner.any_order:
            return False
        if most is not None and n != most + 1:
            return False
        layer.segments = [exact]
        gone = layer.drop_one(self.inner.decode_score(layer, self._row(layer, query), n - 1))
        layer.segments = [*self._with_one(layer, *demoted, gone=gone), exact]
        return True

    def _with_one(self, layer: Layer, low: Segment, *waiting: DenseSegment, gone: Stored) -> list[Segment]:
        """The segments of what was demoted, and one token more of each head."""
        if isinstance(low, CodedSegment):
            low.put(gone, whole=True)
            return [low]
        if not waiting:
            return [low, DenseSegment.of(gone)]
        waiting[0].put(gone)
        if waiting[0].slots < self.waits:
            return [low, waiting[0]]
        self._pack(low, waiting[0].stored(), torch.full(gone.positions.shape[:2], self.waits), layer.index)
        return [low]

    def _counts(self, layer: Layer) -> torch.Tensor:
        """Exact tokens of each row after a decoded token, int64 [batch, 1]."""
        lengths = layer.lengths().amax(1, keepdim=True)
        budget = self.inner.budget
        if budget.tokens is not None:
            return lengths.clamp(max=budget.tokens)
        if self.grow:
            allowed = torch.tensor([[budget.count(int(seen))] for seen in layer.remaining])
            return torch.minimum(lengths, torch.maximum(allowed, lengths - 1))
        return lengths - 1

    # ---- demoting ----------------------------------------------------------------------------------------------

    @contextmanager
    def _demoting(self, layers: Sequence[Layer]) -> Iterator[None]:
        """While it lasts these layers show their exact tokens alone; those dropped meanwhile are demoted at its end.

        So the token statistics of a scorer are those of the exact tokens.
        """
        if not self.low:
            yield
            return
        aside = [(layer, layer.segments[:-1], copy.copy(layer.segments[-1])) for layer in layers]
        for layer, others, _ in aside:
            layer.segments = layer.segments[len(others) :]
            layer.notes[self.name] = False
        yield
        for layer, others, before in aside:
            layer.segments = [*others, layer.segments[0]]
            if layer.notes.pop(self.name):
                self._demote(layer, before)

    def on_evict(self, layer: Layer, kept: torch.Tensor) -> None:
        """Note that the scorer has dropped something, if it is its turn."""
        super().on_evict(layer, kept)
        if self.name in layer.notes:
            layer.notes[self.name] = True

    def _demote(self, layer: Layer, before: Segment) -> None:
        """Codes what was dropped from `before`."""
        *demoted, exact = layer.segments
        gone = picked(before.stored(), _missing(before.held_positions(), exact.held_positions()))
        if self.scaled:
            demoted = self._packed(layer, *demoted, gone=gone)
        else:
            check_codable(gone, lambda row, head: f"layer {layer.index}, row {row}, head {head}")
            demoted[0].put(gone)
        layer.segments = [*demoted, exact]

    def _packed(self, layer: Layer, low: BalancedSegment, *waiting: Segment, gone: Stored) -> list[Segment]:
        """Packs what was dropped together with what waits; the rest waits on."""
        # Those that wait came first: oldest first into blocks, so that none waits for ever.
        if waiting:
            held = waiting[0].stored()
            gone = Stored(*(torch.cat([getattr(x, f) for x in (held, gone)], 2) for f in _FIELDS))
        real = gone.positions >= 0
        # Whole blocks per head: heads may have demoted different numbers.
        counts = real.sum(-1).cpu() // self.waits * self.waits
        ready = real & (real.cumsum(-1) <= counts.to(real.device)[..., None])
        if bool(counts.any()):
            self._pack(low, picked(gone, ready), counts, layer.index)
        late = real & ~ready
        left = late.sum(-1).cpu()
        if not bool(left.any()):
            return [low]
        rest = gone.keys[late], gone.values[late], gone.positions[late]
        shape = (*left.shape, int(left.max()))
        alike = bool((left == shape[2]).all())
        rows = DenseSegment.of(Stored(*(x.view(*shape, *x.shape[1:]) for x in rest))) if alike else None
        return [low, rows or RaggedSegment(*rest, left)]

    def _pack(self, low: BalancedSegment, taken: Stored, counts: torch.Tensor, index: int) -> None:
        """Moves tokens into the packed segment; counts int64 [batch, kv_heads] on the CPU."""
        for what, x in (("keys", taken.keys), ("values", taken.values)):
            bad = (~(x.abs().amax((2, 3)).float() <= torch.finfo(torch.float16).max)).nonzero()
            if len(bad):
                raise ValueError(
                    f"layer {index}, row {int(bad[0, 0])}, head {int(bad[0, 1])}: the {what} hold NaN, inf or values "
                    "beyond float16 and cannot be packed"
                )
        halves = (
            pack(blocks_of(x.flatten(0, 1), counts.view(-1), self.waits), self.low, layout="token", group=self.group)
            for x in (low.balanced(taken.keys), taken.values.float())
        )
        low.take(*halves, counts, taken.positions)


_OF_SCALES = ("group", "block", "balance")
_FIELDS = ("keys", "values", "positions")


def _missing(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """Which of the positions `before` [batch, kv_heads, n] (-1 = none) are not among those `now` [.., c]."""
    table = torch.zeros(*before.shape[:2], int(before.max()) + 2, dtype=torch.bool, device=before.device)
    table.scatter_(-1, now.long() + 1, True)
    return ~table.gather(-1, before.long() + 1) & (before >= 0)
