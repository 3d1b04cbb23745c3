"""TurboQuant: every token as the codes of its turned coordinates, 2, 3 or 4 bits each (arXiv 2504.19874).

A fixed random rotation makes the coordinates of any vector nearly normal, so that one codebook, the best for a normal
variable, serves every key and value of every model: nothing is calibrated, no group shares a scale. A token is coded by
itself when it comes (`textkv.segments.coded`), hence tokens also leave one by one: "h2o+turboquant(4)" evicts at every
decoded token as h2o alone does.

The paper has a second form, in which one of the bits is the sign of a random projection of the error (QJL): unbiased,
at twice the error. As in vLLM's, it is left out: through a softmax the error costs more than the bias.

Where the paper, vLLM and this differ: vLLM turns by a plain Hadamard matrix, without signs, and so loses three quarters
of a key that is mostly constant; here each layer draws signs, and keys are centred first, as kivi's are, but for those
that a centre makes longer: the first token's, above all, on which much of the attention rests. vLLM stores values as
plain integers between their extremes; here they are turned and coded as keys are, 2 bytes a token less. It keeps the
length of what is decoded, by dividing by the norm of the codes at every read; the same is done here once, when the
scale is stored (`fit="norm"`). The paper splits off outlier channels for 2.5 and 3.5 bits: not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, get_args

import torch

from textkv.centring import Centring, check_centring, find_centre, followed
from textkv.context import Context
from textkv.evidence import Evidence, Needs
from textkv.kernels.codebook import Fit, check_bits
from textkv.layer import Layer
from textkv.method import Capabilities, Method, register
from textkv.packing import check_left
from textkv.positions import RotarySpec
from textkv.segments.base import Segment, Stored
from textkv.segments.coded import CodedSegment, Coding
from textkv.segments.dense import DenseSegment
from textkv.segments.ragged import RaggedSegment
from textkv.segments.split import Part, SplitSegment

_FEW = 16  # tokens from which a centre is not taken: that of the first token alone would be far from all others
_SAMPLE = 512  # tokens of a head on which the two centres are compared
_LIMIT = torch.finfo(torch.float16).max


@register("turboquant")
@dataclass(frozen=True)
class TurboQuant(Method):
    """bits + 16 / head_dim bits per element: 4.125 for `turboquant(4)` at head_dim 128, 3.125 and 2.125 below it.

    A prompt is read exactly and coded when its block ends, after the method to the left of the `+` has evicted; from
    then on, what comes is coded after the forward that brought it (the chunks of a later prompt read one another's
    codes). No newest tokens stay exact.

    A prompt announced with `begin` and read in chunks equals one forward but for single codes: chunks round keys and
    values differently in the last fp32 digit, and a coordinate that lies so close to a boundary gets the neighbouring
    code. Each such step moves a token by up to a centroid's distance, the further the fewer the bits, so outputs of 2
    bits may differ by more than rounding; most prompts have no such coordinate.

    Attributes:
        bits: of a key's codes, 1 to 8.
        value_bits: of a value's codes; None = as many.
        centre: what is subtracted from keys: see `textkv.packing.Packer`. Set from the first prompt; a head that holds
            fewer than 16 tokens then has none. Under M-RoPE it stands still.
        fit: "norm", "plain" (the paper), "least" or "unbiased": how a token's scale follows from its codes, see
            `kernels.codebook.encode`.
        seed: of the signs. Each layer has its own, the same in every run, which are saved with the cache.

    Raises:
        ValueError: an impossible setting, or a method on the left that stores tokens in a way of its own.
    """

    bits: int = 4
    value_bits: int | None = None
    centre: Centring = "auto"
    fit: Fit = "norm"
    seed: int = 0

    wraps: ClassVar = "any"
    capabilities: ClassVar[Capabilities] = Capabilities(lossy=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.bits)
        if self.value_bits is not None:
            check_bits(self.value_bits)
        check_centring(self.centre)
        if self.fit not in get_args(Fit):
            raise ValueError(f"fit={self.fit!r} is not known; use 'norm', 'plain', 'least' or 'unbiased'")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed!r} is no seed; use a whole number from 0 to 2147483647")
        if self.inner is not None:
            check_left(
                self.inner, self.name, "code", "holds tokens in a way of its own, moves or merges them while decoding; "
                "use a method that scores tokens, e.g. h2o",
            )  # fmt: skip
            known = replace(self.inner.capabilities, lossy=True, scores=False, whole_heads=False)
            object.__setattr__(self, "capabilities", known)

    @property
    def looks_across(self) -> bool:
        """As the method on the left: each layer is coded by itself."""
        return self.inner is not None and self.inner.looks_across

    @property
    def evicts(self) -> bool:
        """As the method on the left: coding alone drops nothing."""
        return self.inner is not None and self.inner.evicts

    def needs(self) -> Needs:
        """What the left method needs, and where keys turn if the centre may turn with them."""
        return super().needs() | Needs(positions=self.centre in ("auto", "turned"))

    # ---- the left method's moments -----------------------------------------------------------------------------

    def on_start(self, layer: Layer) -> None:
        """Check that the centre fits the model.

        Raises:
            ValueError: centre="turned" where it is not known how keys turn.
        """
        self._rotary(layer)
        if self.inner is not None:
            self.inner.on_start(layer)

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Lets the left method evict, then codes what is left."""
        if self.inner is not None:
            self.inner.on_prefill_end(layer, evidence)
        self._code(layer)

    def on_decode_begin(self, layer: Layer, query: torch.Tensor) -> None:
        """The left method's moment."""
        if self.inner is not None:
            self.inner.on_decode_begin(layer, query)

    def on_decode_end(self, layer: Layer, query: torch.Tensor) -> None:
        """The left method's moment: it may drop any row, since each is coded by itself."""
        if self.inner is not None:
            self.inner.on_decode_end(layer, query)

    def on_finish(self, context: Context) -> None:
        """The left method's moment, then codes what it has only now divided by heads."""
        if self.inner is not None:
            self.inner.on_finish(context)
        for layer in context.layers:  # a method that divides heads does it only now
            self._code(layer)

    # ---- coding ------------------------------------------------------------------------------------------------

    def _code(self, layer: Layer) -> None:
        """Codes what is still exact. Slots stay where they are, and so do the left method's token statistics."""
        place = f"layer {layer.index}"
        layer.segments = [
            self._coded(layer, segment, lambda row, head: f"{place}, row {row}, head {head}")
            for segment in layer.segments
        ]
        if isinstance(layer.segments[0], SplitSegment):  # heads that hold few tokens, in rings, stay exact
            for part in layer.segments[0].parts:
                part.segment = self._coded(layer, part.segment, partial(_unit_name, layer.index, part), part.row)

    def _coded(
        self, layer: Layer, segment: Segment, name: Callable[[int, int], str], rows: torch.Tensor | None = None
    ) -> Segment:
        """The segment's tokens in a coded one; a segment that is not plain, or holds nothing, itself.

        Args:
            name: says which head of the model a row and head of the segment are.
            rows: int64 [batch], which row of the cache a row of the segment is; None = they are the same.

        Raises:
            ValueError: NaN or inf in what is to be coded, or a vector longer than float16 can say.
        """
        if not isinstance(segment, DenseSegment | RaggedSegment) or segment.is_empty():
            return segment
        held = segment.stored()
        check_codable(held, name)
        repeat = segment.head_repeat if isinstance(segment, DenseSegment) else 1
        coded = self.empty(layer, held, rows, repeat)
        coded.take(held, ragged=isinstance(segment, RaggedSegment))
        return coded

    def empty(self, layer: Layer, held: Stored, rows: torch.Tensor | None = None, repeat: int = 1) -> CodedSegment:
        """A segment that codes tokens like those of `held`, which say where its centre is, and holds none yet.

        Args:
            rows: as of `_coded`.
            repeat: stored heads of an incoming one.
        """
        sample = Stored(*(x[:, :, :_SAMPLE] for x in (held.keys, held.values, held.positions)))
        centre, inv_freq, _ = find_centre(self.centre, held, sample, self._rotary(layer), rows, _lengths)
        if centre is not None:
            centre = centre * ((held.positions >= 0).sum(-1) >= _FEW).to(centre)[..., None]
        coding = Coding(self._signs(layer), (self.bits, self.value_bits or self.bits), self.fit)
        segment = CodedSegment(held.keys.dtype, coding, centre, inv_freq, repeat)
        segment.take(Stored(*(x[:, :, :0] for x in (held.keys, held.values, held.positions))), ragged=False)
        return segment

    def _signs(self, layer: Layer) -> torch.Tensor:
        """int8 [2, head_dim], drawn on the CPU so that every device gets the same."""
        generator = torch.Generator().manual_seed(self.seed * 65537 + layer.index)
        return (torch.randint(0, 2, (2, layer.head_dim), generator=generator) * 2 - 1).to(layer.device, torch.int8)

    def _rotary(self, layer: Layer) -> RotarySpec | None:
        """How a centre of this layer may turn; None = it stands still."""
        spec = followed(layer, self.centre, self.name)
        if spec is None or spec.axes is None:
            return spec
        if self.centre == "turned":
            raise ValueError(
                f"{self.name}(centre='turned') cannot follow keys that turn by three positions (M-RoPE); use "
                "centre='fixed', or kivi, whose centre can"
            )
        return None


def _lengths(keys: torch.Tensor) -> torch.Tensor:
    """Of centred keys [batch, heads, n, head_dim], their lengths together: an error of codes is in proportion to it."""
    return keys.norm(dim=-1).sum(-1)


def _unit_name(layer: int, part: Part, unit: int, _head: int) -> str:
    """Which head of the model a single-head row of a split segment's part is."""
    return f"layer {layer}, row {int(part.row[unit])}, head {int(part.head[unit])}"


def check_codable(held: Stored, name: Callable[[int, int], str]) -> None:
    """Raise ValueError naming the first head with a key or value that cannot be coded. Of keys also what a centre would
    take away counts: a bias so large is beyond the model's own float16."""
    hole = held.positions < 0
    for what, x in (("keys", held.keys), ("values", held.values)):
        longest = x.float().norm(dim=-1).masked_fill(hole, 0).amax(2)
        bad = (~(longest <= _LIMIT)).nonzero()
        if len(bad):
            row, head = bad[0].tolist()
            size = float(longest[row, head])
            found = f"a vector of length {size:.3g}" if size < float("inf") else "NaN or inf"
            raise ValueError(f"{name(row, head)}: the {what} hold {found}, which cannot be coded (limit 65504)")
