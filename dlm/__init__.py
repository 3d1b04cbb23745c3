"""Diffusion language models on current transformers: native LLaDA and Dream, cache policies, unmasking rules.

from dlm import decode, load_model

model, tokenizer = load_model("GSAI-ML/LLaDA-8B-Instruct")
ids = tokenizer("...", return_tensors="pt").input_ids
done = decode(model, ids, gen_length=128, cache="freecache+kivi(4)", unmask="threshold(0.9)")
print(tokenizer.decode(done.ids[0]), done.stats)
"""

import textkv  # noqa: F401  (first: it hears what the imports below raise)
from dlm.cache import list_caches, resolve_cache
from dlm.config import DecodingConfig
from dlm.decode import Decoded, Piece, Stats, decode, stream
from dlm.models import DecodingSpec, load_model
from dlm.unmask import Guider, list_rules, resolve_unmask

__all__ = [
    "DecodingConfig",
    "DecodingSpec",
    "Decoded",
    "Guider",
    "Piece",
    "Stats",
    "decode",
    "list_caches",
    "list_rules",
    "load_model",
    "resolve_cache",
    "resolve_unmask",
    "stream",
]
