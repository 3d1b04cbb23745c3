"""One forward of several conversations, each on a cache of its own: their new tokens lie one behind the other.

What a model does token by token (projections, norms, experts) is done once for all; attention and what a method makes
of it stay each cache's own, whatever it holds, so no row is padded and no cache is laid out anew when a row comes or
goes. A prompt of one and a decoded token of another are read in the same forward (packing, continuous batching).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from textkv.layer import Layer, View
from textkv.rollback import Rollback

PROBE = ((7, 11, 5, 9, 6), (8, 5, 12))
"""Ids of two short texts, with which `packs` tries a model."""
CLOSE = 1e-3
"""How far logits may lie apart there, as a share of their range; other sums of numbers of 16 bits: 32 times that."""


class Views:
    """The new tokens of several caches in one layer: their views and where each one's tokens lie, in order.

    It has the shape, dtype and device of all keys together, for libraries that look at these on the way.
    """

    def __init__(self, keys: torch.Tensor, parts: Sequence[tuple[View, slice]]) -> None:
        self.parts, self.shape, self.dtype, self.device = parts, keys.shape, keys.dtype, keys.device


class Together(Cache):
    """What a model takes for its cache while it reads the new tokens of several.

    Args:
        caches: `MethodCache`s of one row each, of the same model and method.
        counts: new tokens of each.
    """

    def __init__(self, caches: Sequence[Rollback], counts: Sequence[int]) -> None:
        # What models ask about layers is the same of all.
        super().__init__(layers=caches[0].layers)
        self.context, self.caches = caches[0].context, caches
        self.past = [cache.get_seq_length() for cache in caches]
        ends = torch.tensor(counts).cumsum(0).tolist()
        self.parts = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]

    def call_begins(self, pictures: bool = False) -> None:
        """See `MethodCache`."""
        for cache in self.caches:
            cache.call_begins(pictures)

    def call_ends(self) -> None:
        """See `MethodCache`."""
        for cache in self.caches:
            cache.call_ends()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Wraps keys and values [1, kv_heads, all new tokens, head_dim] for our attention function."""
        views = [
            (cache.update(key_states[:, :, part], value_states[:, :, part], layer_idx)[0], part)
            for cache, part in zip(self.caches, self.parts, strict=True)
        ]
        found = Views(key_states, views)
        return found, found

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The most columns that one of them has seen."""
        return max(self.past)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """See `Layer.get_mask_sizes`: each cache's own mask is made where its tokens are."""
        return max(self.past) + query_length, False


def forward(model: PreTrainedModel, rows: Sequence[tuple[Rollback, torch.Tensor]]) -> torch.Tensor:
    """Reads new tokens of several caches; the logits behind each one's last, fp32 [rows, vocabulary].

    Args:
        rows: caches of one row, and ids int64 [1, m] that each has not seen. All are tokens.
    """
    cache = Together([cache for cache, _ in rows], [ids.shape[1] for _, ids in rows])
    each = zip(cache.past, (ids for _, ids in rows), strict=True)
    places = torch.cat([torch.arange(past, past + ids.shape[1]) for past, ids in each])[None].to(model.device)
    last = torch.tensor([part.stop - 1 for part in cache.parts], device=model.device)
    kept = {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    ids = torch.cat([ids for _, ids in rows], 1).to(model.device)
    with torch.no_grad():
        out = model(input_ids=ids, position_ids=places, past_key_values=cache, use_cache=True, return_dict=True, **kept)
    logits = out.logits[0] if kept else out.logits[0, last]
    return logits.float()


def packs(model: PreTrainedModel, empty: Callable[[], Rollback]) -> bool:
    """Whether a model reads two texts in one forward as it reads each alone, and goes on so. Tried, not looked up:
    models count positions and build masks in ways of their own.

    Args:
        empty: makes a cache that keeps all.
    """
    # States are of a row, not of a token; and where a position is more than a count, nobody gives it here.
    plain = all(isinstance(layer, Layer) and not hasattr(layer, "conv_states") for layer in empty().layers)
    if not plain or hasattr(getattr(model, "model", None), "get_rope_index"):
        return False
    size = model.config.get_text_config().vocab_size
    texts = [torch.tensor([[i % size for i in text]]) for text in PROBE]
    close = CLOSE if model.dtype == torch.float32 else 32 * CLOSE
    alone, both = [empty() for _ in texts], [empty() for _ in texts]
    found = False
    # Whatever it raises, it cannot be read so.
    with suppress(Exception):
        for step in range(2):
            new = [ids[:, : 1 if step else None] for ids in texts]
            expected = torch.cat([forward(model, [row]) for row in zip(alone, new, strict=True)])
            apart = (forward(model, list(zip(both, new, strict=True))) - expected).abs().max()
            if not bool(apart <= close * (expected.max() - expected.min())):
                return False
        found = True
    return found
