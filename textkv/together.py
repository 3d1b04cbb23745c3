"""One forward of several conversations, each on a cache of its own: their new tokens lie one behind the other.

What a model does token by token (projections, norms, experts) is done once for all; attention and what a method makes
of it stay each cache's own, whatever it holds, so no row is padded and no cache is laid out anew when a row comes or
goes. A prompt of one and a decoded token of another are read in the same forward (packing, continuous batching).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from textkv.layer import Layer, View
from textkv.rollback import Rollback

PROBE = ((7, 11, 5, 9, 6), (8, 5, 12))
"""Ids of two short texts, with which `packs` tries a model."""
AXES = 4  # of positions where pictures have places of their own: the order of tokens, then time, height and width
CLOSE = 1e-3
"""How far logits may lie apart there, as a share of their range; other sums of numbers of 16 bits: 32 times that."""


class New(NamedTuple):
    """What a cache of one row has not seen.

    Attributes:
        ids: int64 [1, m]; all are tokens.
        places: int64 [axes, m], where the model's rotary embedding turns them to, one behind the other after what the
            cache has seen where it is None.
        pictures: those among the ids, `pixel_values` and `image_grid_thw` as the model takes them.
    """

    cache: Rollback
    ids: torch.Tensor
    places: torch.Tensor | None = None
    pictures: Mapping[str, torch.Tensor] = {}


class Views:
    """The new tokens of several caches in one layer: their views and where each one's tokens lie, in order.

    It has the shape, dtype and device of all keys together, for libraries that look at these on the way.
    """

    def __init__(self, keys: torch.Tensor, parts: Sequence[tuple[View, slice]]) -> None:
        self.parts, self.shape, self.dtype, self.device = parts, keys.shape, keys.dtype, keys.device


class Together(Cache):
    """What a model takes for its cache while it reads the new tokens of several.

    Args:
        rows: of `MethodCache`s of one row each, of the same model and method.
    """

    def __init__(self, rows: Sequence[New]) -> None:
        # What models ask about layers is the same of all.
        super().__init__(layers=rows[0].cache.layers)
        self.rows, self.caches = rows, [row.cache for row in rows]
        self.context = self.caches[0].context
        self.past = [cache.get_seq_length() for cache in self.caches]
        counts = [row.ids.shape[1] for row in rows]
        ends = torch.tensor(counts).cumsum(0).tolist()
        self.parts = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]

    def call_begins(self, pictures: bool = False) -> None:
        """See `MethodCache`."""
        for row in self.rows:
            row.cache.call_begins(bool(row.pictures))

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


def forward(model: PreTrainedModel, rows: Sequence[New | tuple[Rollback, torch.Tensor]]) -> torch.Tensor:
    """Reads new tokens of several caches; the logits behind each one's last, fp32 [rows, vocabulary]."""
    rows = [New(*row) for row in rows]
    cache = Together(rows)
    places = [_places(model, row, past) for row, past in zip(rows, cache.past, strict=True)]
    places = torch.cat([one.to(model.device) for one in places], 1)
    # One axis, or three for where a token lies in its picture and one in front for the order of tokens.
    told = {"position_ids": places if len(places) == 1 else places[:, None]}
    # Pictures fill the places that ids leave for them in order, whoever's they are.
    for name in dict.fromkeys(name for row in rows for name in row.pictures):
        told[name] = torch.cat([row.pictures[name] for row in rows if name in row.pictures])
    last = torch.tensor([part.stop - 1 for part in cache.parts], device=model.device)
    kept = {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    ids = torch.cat([row.ids for row in rows], 1).to(model.device)
    with torch.no_grad():
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, return_dict=True, **told, **kept)
    logits = out.logits[0] if kept else out.logits[0, last]
    return logits.float()


def _places(model: PreTrainedModel, row: New, past: int) -> torch.Tensor:
    if row.places is not None:
        return row.places
    return torch.arange(past, past + row.ids.shape[1]).expand(AXES if places_pictures(model) else 1, -1)


def places_pictures(model: PreTrainedModel) -> bool:
    """Whether a token's rotary position tells where in its image it lies (M-RoPE)."""
    return hasattr(getattr(model, "model", None), "get_rope_index")


def packs(model: PreTrainedModel, empty: Callable[[], Rollback]) -> bool:
    """Whether a model reads two texts in one forward as it reads each alone, and goes on so. Tried, not looked up:
    models count positions and build masks in ways of their own.

    Args:
        empty: makes a cache that keeps all.
    """
    # States are of a row, not of a token.
    if not all(isinstance(layer, Layer) and not hasattr(layer, "conv_states") for layer in empty().layers):
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
