"""How a model makes weights of the products of queries and keys: what every score of a token has to follow too."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Softmax(NamedTuple):
    """Scores are scale * q . k, soft-capped where the model does (Gemma 2); weights are their softmax, in which a
    learned sink (gpt-oss) takes part although it is no token.

    Attributes:
        scale: factor on q . k.
        softcap: scores s become softcap * tanh(s / softcap); None = as they are.
        sinks: [heads], a logit of each query head beside its scores, which gives no output; None = none.
    """

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def options(self) -> dict[str, Any]:
        """As `textkv.kernels.window_mass` takes it."""
        return self._asdict()

    def of_heads(self, which: slice) -> Softmax:
        """That of some query heads."""
        return self if self.sinks is None else self._replace(sinks=self.sinks[which])

    def scores(self, products: torch.Tensor) -> torch.Tensor:
        """fp32 of any shape, of products q . k."""
        return soft_capped(products * self.scale, self.softcap)

    def weights(self, scores: torch.Tensor) -> torch.Tensor:
        """Softmax of scores [.., heads, w, n] over their last axis, which sums to less than 1 beside a sink; `heads` is
        [kv_heads, group] or one axis.
        """
        if self.sinks is None:
            return scores.softmax(-1)
        lse = scores.logsumexp(-1, keepdim=True)
        return (scores - lse).exp() * (lse - beside(self.sinks, scores)).sigmoid()


def beside(sinks: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Sinks [heads] in fp32 and a shape that broadcasts with scores [batch, heads, w, n], [heads, w, n], or, split by
    KV heads, [batch, kv_heads, group, w, n]."""
    heads = scores.shape[1:3] if scores.dim() == 5 else scores.shape[-3:-2]
    return sinks.float().view(*heads, 1, 1)


def soft_capped(scores: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Scores of any shape under a soft cap, cap * tanh(scores / cap); as they are without one."""
    return scores if cap is None else cap * (scores / cap).tanh()
