"""SnapKV: keep what the prompt's last tokens look at (arXiv 2404.14469).

Each past token's score is the attention it gets from the last `window` prompt tokens, pooled over its neighbours and
averaged over the query heads of its KV head. The window itself is always kept and counts against the budget. The
authors' code repeats KV heads before caching, so it stores group times the bytes: we select per KV head.
"""

from dataclasses import dataclass

import torch

from textkv.eviction import Eviction
from textkv.evidence import Evidence, Needs
from textkv.layer import Layer
from textkv.method import register
from textkv.scores import Pool, fit_window, group_mean, past_mass, pool, with_window
from textkv.segments.base import Stored


@register("snapkv")
@dataclass(frozen=True)
class SnapKV(Eviction):
    """Compresses at the end of each prompt block; decoded tokens are all kept.

    Defaults differ elsewhere: kvpress observes 64 tokens, and Ada-KV's code pools with kernel=7, pooling="max".

    Attributes:
        window: observation window in tokens. The paper uses 16 to 64; 32 is the authors' default from model configs.
        kernel: pooling width in tokens, odd; 1 = no pooling.
        pooling: "avg" (the authors' long-context scripts) or "max".
    """

    heads_apart = True

    window: int = 32
    kernel: int = 5
    pooling: Pool = "avg"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window={self.window}: the observation window needs at least 1 token")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: pooling needs an odd width of at least 1")
        if self.pooling not in ("avg", "max"):
            raise ValueError(f"pooling={self.pooling!r}: use 'avg' or 'max'")

    def needs(self) -> Needs:
        """The queries of the observation window."""
        return Needs(window=self.window)

    def score(self, layer: Layer, held: Stored, evidence: Evidence, keep: int) -> torch.Tensor:
        """The window's attention to each token before it, pooled: fp32 [batch, kv_heads, n]; the window PROTECTED."""
        # The window counts against the budget, so a small budget shrinks it.
        queries = fit_window(evidence.queries, held.keys.shape[2], keep)
        kv_heads = held.keys.shape[1]
        mass = past_mass(queries, held.keys, evidence.softmax)
        # Mean over the group first: the same as after for an average, and what the max variant's authors do.
        past = pool(group_mean(mass, kv_heads), self.kernel, self.pooling)
        return with_window(past, queries.shape[2])
