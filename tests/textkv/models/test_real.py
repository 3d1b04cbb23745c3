"""The real models, where they are installed: nothing is fetched for a test."""

from __future__ import annotations

import pytest
import torch

from textkv import MethodCache
from textkv.models import load, resolve
from textkv.models.embedder import Embedder

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def needs(name: str, use: str = "text") -> pytest.MarkDecorator:
    """Skips where a model is not installed, and says how it would be."""
    try:
        resolve(name, use)
    except FileNotFoundError as error:
        return pytest.mark.skip(reason=str(error))
    return pytest.mark.filterwarnings("default")


@needs("smollm2")
def test_smollm2_knows_paris() -> None:
    model, tokenizer = load("smollm2")
    assert model.dtype == torch.float32 and model.config.num_key_value_heads == 3
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    for method, budget in (("full", 1.0), ("snapkv(window=8,kernel=1)", 0.8)):
        cache = MethodCache(model, method, budget)
        out = model.generate(**ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
        assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :]), method
    assert cache.at_rest.kv_bytes < 0.9 * cache.at_rest.full_bytes


@needs("gemma3-270m")
def test_gemma_slides_in_fifteen_layers() -> None:
    model, tokenizer = load("gemma3-270m")
    prompt = tokenizer("The first letters of the alphabet are A, B, C, D, " * 45, return_tensors="pt")
    assert prompt["input_ids"].shape[1] > 600, "longer than the window"
    plain = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    caches = {}
    for method, budget in (("full", 1.0), ("snapkv", 0.5)):
        caches[method] = MethodCache(model, method, budget)
        out = model.generate(**prompt, past_key_values=caches[method], max_new_tokens=8, do_sample=False)
        assert torch.equal(out, plain), method
    kinds = [layer.kind.name for layer in caches["snapkv"].layers]
    assert kinds.count("full") == 3 and kinds.count("sliding") == 15
    assert {layer.kind.window for layer in caches["snapkv"].layers} == {None, 512}
    assert caches["snapkv"].at_rest.kv_bytes < caches["full"].at_rest.kv_bytes


@needs("minilm", "embedder")
def test_minilm_puts_like_beside_like() -> None:
    asked, like, other = Embedder.load().embed(["A man eats food.", "Someone has a meal.", "The sky is blue."])
    assert asked @ like > 0.5 > asked @ other
