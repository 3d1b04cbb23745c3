"""Models in half precision: every cache with every rule, and nothing that turns into fp32 unseen."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from dlm.cache import list_caches, resolve_cache
from dlm.config import DecodingConfig
from dlm.decode import decode
from dlm.unmask import list_rules, parse_rule
from tests.dlm.toys import END, MASK, PAD, VOCAB, block_causal, dream, llada, prompts, traced

CACHES = [*list_caches(block_causal=False), "dual+suffix(4)", "freecache+snapkv(0.5)", "freecache+kivi(4)"]
HALVES = [torch.bfloat16, torch.float16]


class Watched:
    """A model's forward whose logits and cache are looked at."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.plain, self.calls = model, model.forward, 0
        model.forward = self.forward

    def forward(self, *args, **kwargs):
        out, cache = self.plain(*args, **kwargs), kwargs["past_key_values"]
        self.calls += 1
        assert out.logits.dtype == self.model.dtype and bool(out.logits.isfinite().all())
        for held in [x for layer in cache.layers for x in layer.tensors()]:
            assert held.dtype == self.model.dtype and bool(held.isfinite().all())
        return out


def guider() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=VOCAB, intermediate_size=16, eos_token_id=END, pad_token_id=PAD, **shape)
    return Qwen2ForCausalLM(config).eval()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("cache", CACHES)
def test_every_rule_decodes_and_the_cache_is_as_narrow_as_the_model(cache, dtype):
    ids, mask = prompts(6, 3)
    # The two families turn keys in different precisions: fp32, and the model's own.
    for model in (llada().to(dtype), dream().to(dtype))[: 2 if dtype == torch.bfloat16 else 1]:
        watch = Watched(model)
        for rule in list_rules():
            guide = guider().to(dtype) if rule == "guided" else None
            config = DecodingConfig(gen_length=8, block_length=4, cache=cache, unmask=rule, guided=guide is not None)
            try:
                parse_rule(rule).check(config, resolve_cache(cache), hooked=False)
            except ValueError:
                continue
            if rule == "wino" and model.decoding_spec.shift:
                continue
            before = watch.calls
            done = decode(model, ids, mask, config=config, guide=guide)
            assert watch.calls > before and MASK not in done.ids.tolist()[0] + done.ids.tolist()[1]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("cache", ["freecache", "prefix"])
def test_an_exact_cache_gives_the_logits_of_none_but_for_the_last_bits(cache, dtype):
    """Where no block sees a later one, what is stored is what would be computed."""
    model, (ids, _) = block_causal(5, 4).to(dtype), prompts(5)
    plain, cached = (traced(model, ids, name)[1] for name in ("none", cache))
    slack = 16 * torch.finfo(dtype).eps
    for (_, mine), (_, truth) in zip(cached, plain, strict=True):
        allowed = slack * (1 + truth[truth.isfinite()].abs().max())
        assert torch.equal(mine.isfinite(), truth.isfinite())
        assert (mine - truth)[truth.isfinite()].abs().max() <= allowed
