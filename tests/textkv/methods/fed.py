"""One layer that is fed tokens of its own: what a method makes of them, forward by forward."""

from functools import cache as once

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.textkv import tiny
from textkv import MethodCache

DIM, HEADS, GROUP = 16, 2, 2


@once
def one_layer_model(dim=DIM):
    shape = {"num_hidden_layers": 1, "head_dim": dim, "max_position_embeddings": 8192}
    return LlamaForCausalLM(LlamaConfig(**tiny.TEXT | shape)).eval()


def tokens(n, batch=1, dim=DIM, seed=0):
    """Random queries, keys and values of one layer."""
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, h, n, dim, generator=g) for h in (HEADS * GROUP, HEADS, HEADS))


def feed(method, budget, qkv, prompt, model=None):
    """A cache whose layer reads a prompt and then one token at a time: yields (layer, last output) after each."""
    cache = MethodCache(model or one_layer_model(qkv[0].shape[-1]), method, budget)
    layer, n = cache.layers[0], qkv[0].shape[2]
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, n))]:
        q, k, v = (x[:, :, start:stop] for x in qkv)
        layer.update(k, v)
        yield layer, layer.feed(q, k, v, DIM**-0.5)
