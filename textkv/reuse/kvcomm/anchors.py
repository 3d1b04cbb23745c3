"""Anchors: texts of earlier requests, with what their context did to their keys and values (arXiv 2510.12872, Eq. 5).

Of each placeholder a pool keeps some texts that were once read densely: the base KV of the text, and for each agent the
offset from the base to the KV that the agent's prompt really gave it, and to that of the fixed piece behind it. A new
text may be estimated from them (`verdict.share`) or becomes an anchor itself.

The paper's two tests are those of length and of entropy. Its entropy depends on the scale of the distances: a plain
norm over all values grows with the square root of the length, so that long texts always seem to have one clearly
nearest anchor. `distance="rms"` divides by the size of the text's own values instead and adds an optional bound on the
distance itself; `distance="paper"` is the released formula.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from textkv.reuse.kvcomm.template import Key, Segment
from textkv.reuse.spans import Span


@dataclass(frozen=True)
class Criteria:
    """When a text is estimated from anchors, and how anchors are weighted.

    Attributes:
        gamma: share of the largest possible entropy up to which weights count as peaked. The paper uses 0.3; 0.1 is
            safer, 1 always shares.
        distance: "rms", differences relative to the size of what is estimated, whatever its length; "paper", the
            released formulas: l2 norm over all values (decision), mean absolute difference of a token (text), l2 norm
            of a channel (piece behind it).
        temperature: of the softmax over anchors; None = 0.05 for "rms" (a difference of 5 % of the text's own size
            weighs e times less), 1 for "paper".
        gate: largest distance to the nearest anchor at which a text is still estimated; None = any.
        nucleus: mass of the weights whose anchors count as used.

    Raises:
        ValueError: a number out of its range, or an unknown distance.
    """

    gamma: float = 0.3
    distance: Literal["rms", "paper"] = "rms"
    temperature: float | None = None
    gate: float | None = None
    nucleus: float = 0.9

    def __post_init__(self) -> None:
        if self.distance not in ("rms", "paper"):
            raise ValueError(f"distance={self.distance!r}: use 'rms' or 'paper'")
        # Written so that what is no number fails too: compared with it everything would be estimated, or nothing.
        if not (self.gamma >= 0 and 0 < self.nucleus <= 1):
            raise ValueError(f"gamma={self.gamma}, nucleus={self.nucleus}: gamma is at least 0, nucleus in (0, 1]")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature}: weights need a finite one above 0; small = the nearest anchor"
            )
        if self.gate is not None and not self.gate >= 0:
            raise ValueError(f"gate={self.gate}: a distance is at least 0; None = any")

    @property
    def heat(self) -> float:
        """The temperature that is used."""
        return self.temperature or (0.05 if self.distance == "rms" else 1.0)

    def weights(self, distances: torch.Tensor) -> torch.Tensor:
        """Softmax over the anchors, the first dimension of fp32 distances; it sums to 1 over them."""
        return (-distances / self.heat).softmax(0)


@dataclass(frozen=True, eq=False)
class Offset:
    """What an agent's prompt added to the base KV: `own` of the text, `behind` of the fixed piece after it."""

    own: Span
    behind: Span


@dataclass(eq=False)
class Anchor:
    """A text that was read densely: what tells it from others, the shape of a picture (None = text), base KV, offsets
    by agent, and how often it was used since."""

    ids: Key
    shape: tuple[int, ...] | None
    base: Span
    offsets: dict[str, Offset] = field(default_factory=dict)
    uses: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of base and offsets."""
        return self.base.nbytes + sum(x.own.nbytes + x.behind.nbytes for x in self.offsets.values())


@dataclass(frozen=True, eq=False)
class Verdict:
    """Whether a text is estimated, why, and from which anchors (one alone if it is the same text) of which weights."""

    share: bool
    why: str
    anchors: tuple[Anchor, ...] = ()
    weights: torch.Tensor | None = None


class AnchorPool:
    """The anchors of one placeholder.

    Args:
        criteria: see `Criteria`.
        capacity: most anchors (the paper's V); 0 = none: every prompt is read densely.
        oldest: of so many oldest anchors the least used one leaves (the paper's W).
        most_bytes: most bytes of all anchors; None = no bound. An anchor that is larger is not kept.

    Attributes:
        anchors: oldest first.

    Raises:
        ValueError: a bound below 0, or no anchor to choose among.
    """

    def __init__(
        self, criteria: Criteria | None = None, capacity: int = 20, oldest: int = 5, most_bytes: int | None = None
    ) -> None:
        if capacity < 0 or oldest < 1 or (most_bytes is not None and most_bytes < 0):
            raise ValueError(
                f"capacity={capacity}, oldest={oldest}, most_bytes={most_bytes}: capacity and bytes are at least 0, "
                "and one of at least 1 oldest anchors leaves"
            )
        self.criteria = criteria or Criteria()
        self.capacity, self.oldest, self.most_bytes = capacity, oldest, most_bytes
        self.anchors: list[Anchor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all anchors."""
        return sum(anchor.nbytes for anchor in self.anchors)

    def judge(self, agent: str, text: Segment) -> Verdict:
        """Whether the text can be estimated for an agent (Eq. 5); nothing is counted as used yet."""
        # An anchor may lack the offsets of an agent that took the short way when it was made.
        known = [anchor for anchor in self.anchors if agent in anchor.offsets]
        same = next((anchor for anchor in known if anchor.ids == text.key), None)
        if same is not None:
            return Verdict(True, "the same text was read before", (same,), torch.ones(1))
        if not text.ids:
            # What stands behind it follows what stood before: no other text tells what that does.
            return Verdict(False, "an empty text, which was not read before")
        # Patches of pictures of another shape lie at other positions: nothing of them can be compared.
        alike = [anchor for anchor in known if anchor.shape == _shape(text)]
        long_enough = tuple(anchor for anchor in alike if anchor.base.tokens >= len(text.ids))
        if len(long_enough) < 2:
            return Verdict(False, f"{len(long_enough)} anchors of at least {len(text.ids)} tokens, 2 are needed")
        distances = torch.stack([self._distance(text.base, anchor.base) for anchor in long_enough])
        weights = self.criteria.weights(distances)
        entropy = float(-(weights * weights.clamp(min=1e-30).log2()).sum())
        limit = self.criteria.gamma * math.log2(len(long_enough))
        nearest = float(distances.min())
        # Equal weights reach the bound of gamma=1 exactly, but for rounding.
        if entropy > limit + 1e-5:
            return Verdict(False, f"entropy {entropy:.2f} of {len(long_enough)} anchors is above {limit:.2f}")
        if self.criteria.gate is not None and nearest > self.criteria.gate:
            return Verdict(False, f"the nearest anchor is {nearest:.2f} away, above the gate {self.criteria.gate}")
        return Verdict(True, f"entropy {entropy:.2f} is within {limit:.2f}", long_enough, weights)

    def _distance(self, text: Span, anchor: Span) -> torch.Tensor:
        """Between values of a text and the first tokens of an anchor: fp32, one number."""
        mine, theirs = text.values.float(), anchor.first(text.tokens).values.float()
        apart = (mine - theirs).norm()
        return apart if self.criteria.distance == "paper" else apart / mine.norm().clamp(min=1e-12)

    def used(self, verdict: Verdict) -> None:
        """Counts the anchors that an estimate stood on: the smallest set with the nucleus of the weights."""
        if verdict.weights is not None:
            for number in nucleus(verdict.weights, self.criteria.nucleus):
                verdict.anchors[number].uses += 1

    def add(self, agent: str, text: Segment, offset: Offset) -> bool:
        """Keeps the offset of an agent's prompt, with the text if it is not an anchor yet. Returns whether it fitted.

        Whoever must leave for it leaves first: at no moment are there more anchors than `capacity`.
        """
        anchor = next((a for a in self.anchors if a.ids == text.key), None)
        fresh = anchor is None
        anchor = anchor or Anchor(text.key, _shape(text), text.base)
        size = offset.own.nbytes + offset.behind.nbytes
        alone = anchor.nbytes + size
        if self.capacity == 0 or (self.most_bytes is not None and alone > self.most_bytes):
            return False
        room = self.capacity - fresh
        while len(self.anchors) > room or (
            self.most_bytes is not None and self.nbytes + size + fresh * anchor.base.nbytes > self.most_bytes
        ):
            self._drop_one(anchor)
        if fresh:
            self.anchors.append(anchor)
        anchor.offsets[agent] = offset
        return True

    def _drop_one(self, but: Anchor) -> None:
        """Of the oldest anchors the least used one leaves, of equal ones the oldest."""
        old = [a for a in self.anchors if a is not but][: self.oldest]
        self.anchors.remove(min(old, key=lambda a: a.uses))


def _shape(text: Segment) -> tuple[int, ...] | None:
    return None if text.picture is None else text.picture.shape


def nucleus(weights: torch.Tensor, mass: float) -> list[int]:
    """The fewest entries of 1-D weights whose sum reaches `mass`, the one that crosses it among them."""
    order = weights.sort(descending=True, stable=True)
    before = order.values.cumsum(0) - order.values
    return order.indices[before < mass].tolist()
