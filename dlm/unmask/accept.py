"""When a guider agrees with a drafted token (FlashDLM, arXiv 2505.21467): six rules over its next-token logits.

    exact       the draft is its most probable token (what the paper reports)
    topk        the draft is among its k most probable ones
    relative    that, and p(draft) >= ratio * p(most probable)
    threshold   p(draft) > tau
    aggressive  among the k, or p(draft) > tau, or inside the top-p set of mass `mass`
    sample      with probability p(draft)

A model has several ways to end a text. They count as one event with the sum of their probabilities, so that the two
models agree to stop whatever token each of them has for it; the authors' code maps them in one direction only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from dlm.unmask.base import check_number
from textkv.kernels import confidence

PARAMETERS: dict[str, dict[str, float]] = {
    "exact": {},
    "topk": {"k": 2},
    "relative": {"k": 2, "ratio": 0.5},
    "threshold": {"tau": 0.1},
    "aggressive": {"k": 5, "tau": 0.05, "mass": 0.95},
    "sample": {},
}
"""The rules and what each one takes, with its default."""


@dataclass(frozen=True)
class Acceptance:
    """One of the six rules.

    Raises:
        ValueError: unknown rule, a parameter that it does not take, or one out of range.
    """

    rule: str
    k: int | None = None
    ratio: float | None = None
    tau: float | None = None
    mass: float | None = None

    def __post_init__(self) -> None:
        if self.rule not in PARAMETERS:
            raise ValueError(f"accept={self.rule!r} is not known; use one of {', '.join(PARAMETERS)}")
        takes = PARAMETERS[self.rule]
        for name in ("k", "ratio", "tau", "mass"):
            value = getattr(self, name)
            if value is not None and name not in takes:
                raise ValueError(f"{name}={value!r}: accept={self.rule!r} takes {', '.join(takes) or 'no parameter'}")
            if name in takes and value is None:
                object.__setattr__(self, name, takes[name])
            elif name in takes and name != "k":
                check_number(name, value, 0, 1, f"{self.rule} has {takes[name]} by default")
        if self.k is not None and (isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1):
            raise ValueError(f"k={self.k!r} is no number of tokens >= 1; {self.rule} has {takes['k']} by default")

    def __call__(self, seen: DraftScores, uniform: Callable[[], torch.Tensor]) -> torch.Tensor:
        """bool [n]: which drafts to accept; `uniform` draws a number in [0, 1) for each."""
        if self.rule == "exact":
            return seen.known & (seen.found.token == seen.drafts)
        if self.rule == "topk":
            return seen.known & (seen.rank < self.k)
        if self.rule == "relative":
            return seen.known & (seen.rank < self.k) & (seen.probability >= self.ratio * seen.best)
        if self.rule == "threshold":
            return seen.known & (seen.probability > self.tau)
        if self.rule == "aggressive":
            # `ahead` is the mass before the draft: below `mass` it belongs to the smallest set that reaches it.
            near = (seen.rank < self.k) | (seen.probability > self.tau) | (seen.ahead < self.mass)
            return seen.known & near
        # Speculative sampling's first half: no token is drawn again from the residual, the draft model's own stays.
        return seen.known & (uniform() < seen.probability)


class DraftScores:
    """What the guider gives each drafted token: whether it knows it, its rank, its probability.

    Args:
        logits: [n, V] of the guider, changed in place.
        drafts: int64 [n], in the guider's ids; one of V or more is unknown to it and never accepted.
        ends: int64 [e], the guider's ids that end a text, to be taken for one.

    Attributes:
        known: bool [n], drafts that the guider has a token for.
    """

    def __init__(self, logits: torch.Tensor, drafts: torch.Tensor, ends: torch.Tensor) -> None:
        if len(ends):
            # The first of them stands for all, with their common mass.
            common = logits.index_select(1, ends).float().logsumexp(1, keepdim=True)
            logits.index_fill_(1, ends, -torch.inf).index_copy_(1, ends[:1], common.to(logits.dtype))
            drafts = torch.where(torch.isin(drafts, ends), ends[0], drafts)
        # An id that the guider lacks is clamped to stay an index; `known` keeps it from being accepted.
        self.logits, self.known = logits, drafts < logits.shape[1]
        self.drafts = drafts.clamp(max=logits.shape[1] - 1)
        self.found = confidence(logits)

    @cached_property
    def _own(self) -> torch.Tensor:
        return self.logits.gather(1, self.drafts[:, None])

    @cached_property
    def _before(self) -> torch.Tensor:
        """bool [n, V]: tokens that the guider prefers to the draft; equals go by the lower id."""
        ids = torch.arange(self.logits.shape[1], device=self.logits.device)[None]
        # Ranks without a sort: [n, V] comparisons are cheaper than sorting V = 150,000 for each draft.
        return (self.logits > self._own) | ((self.logits == self._own) & (ids < self.drafts[:, None]))

    @cached_property
    def rank(self) -> torch.Tensor:
        """int64 [n], tokens that the guider prefers to the draft."""
        return self._before.sum(1)

    @cached_property
    def probability(self) -> torch.Tensor:
        """fp32 [n], of the draft."""
        return (self._own[:, 0].float() - self.found.lse).exp()

    @property
    def best(self) -> torch.Tensor:
        """fp32 [n], of the guider's own choice."""
        return self.found.probability

    @cached_property
    def ahead(self) -> torch.Tensor:
        """fp32 [n], the mass of the tokens that the guider prefers to the draft."""
        p = (self.logits.float() - self.found.lse[:, None]).exp()
        return (p * self._before).sum(1)
