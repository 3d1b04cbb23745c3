"""Attention and a linear state in one layer of a model (Falcon-H1)."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

from textkv.context import Context
from textkv.kinds import LayerKind
from textkv.layer import Layer


class HybridLayer(LinearAttentionLayer, Layer):
    """Attention and a linear state in one layer of the model: the attention is ours, the state transformers'."""

    def __init__(self, kind: LayerKind, context: Context, index: int) -> None:
        LinearAttentionLayer.__init__(self, **{k: v for k, v in kind.options.items() if k == "number_of_states"})
        Layer.__init__(self, kind, context, index)

    def lazy_initialization(self, *args: torch.Tensor, **kwargs: Any) -> None:
        """Prepares the half whose first input this is: the state's or the keys and values'."""
        # transformers hands a state to one and keys and values to the other, under one name.
        if kwargs:
            LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)
        else:
            Layer.lazy_initialization(self, *args)

    def reset(self) -> None:
        """Both halves forget everything."""
        LinearAttentionLayer.reset(self)
        Layer.reset(self)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Both halves take the rows `beam_idx`."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        Layer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the newest tokens of both halves."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        Layer.crop(self, tokens_to_remove)

    get_max_length = Layer.get_max_length
