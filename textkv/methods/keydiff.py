"""KeyDiff: keep the keys that differ most from the mean direction (arXiv 2504.15364).

The anchor of a KV head is the mean of its normalised keys; a key scores by how little it points that way. No queries
are needed. The paper works block by block, which bounds the memory of the prompt: feed the prompt in chunks that end
blocks (`MethodCache.begin` per block) to have the same here.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from textkv.eviction import PROTECTED, Eviction
from textkv.evidence import Evidence
from textkv.layer import Layer
from textkv.method import register
from textkv.segments.base import Stored


@register("keydiff")
@dataclass(frozen=True)
class KeyDiff(Eviction):
    """Compresses at the end of each prompt block; needs no queries.

    Attributes:
        recent: this many last tokens are always kept; 0 in the paper.
    """

    heads_apart = True

    recent: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent < 0:
            raise ValueError(f"recent={self.recent}: may not be negative")

    def score(self, layer: Layer, held: Stored, evidence: Evidence, keep: int) -> torch.Tensor:
        """Minus the cosine of each key with the mean of the head's normalised keys: fp32 [batch, kv_heads, n]."""
        # Normalised before the mean: else the few longest keys would set the anchor.
        keys = F.normalize(held.keys.float(), dim=-1)
        scores = -F.cosine_similarity(keys, keys.mean(2, keepdim=True), dim=-1)
        recent = min(self.recent, keep)
        if recent:
            scores[..., -recent:] = PROTECTED
        return scores
