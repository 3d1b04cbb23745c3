"""A model that caps its scores: what a method makes of attention is the capped one, in prompts and in answers."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from tests.textkv import tiny
from textkv import MethodCache

CAP = 1e-30  # below it every score is +cap or -cap, and every query looks evenly, whatever it asks
METHODS = (
    "snapkv", "pyramidkv", "vl-cache", "cake(window=8)", "cake-official(window=8)", "kvcrush", "vatp", "critic", "d2o",
    "h2o", "tova", "rkv(window=4)", "snapkv+adakv", "cake(window=8)+mikv(16,4)",
)  # fmt: skip


def model_of(query_scale: float) -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    text = tiny.TEXT | {"bos_token_id": 1, "eos_token_id": 1}
    config = Gemma2Config(**text, head_dim=16, attn_logit_softcapping=CAP, layer_types=["full_attention"] * 3)
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(query_scale)
            layer.self_attn.k_proj.weight.mul_(30)
    return model


@pytest.mark.parametrize("budget", [0.4, "20t"])
@pytest.mark.parametrize("method", METHODS)
def test_where_the_cap_makes_all_queries_alike_they_choose_alike(method, budget):
    """Sharp queries and none at all give one and the same attention, so one and the same tokens stay."""
    ids, kept = tiny.text_ids(64), []
    for query_scale in (30.0, 0.0):
        model = model_of(query_scale)
        cache = MethodCache(model, method, budget)
        with torch.no_grad():
            model(ids[:, :56], past_key_values=cache)
            for token in ids[:, 56:].split(1, 1):
                model(token, past_key_values=cache)
        kept.append([layer.stored().positions.tolist() for layer in cache.context.layers])
    assert kept[0] == kept[1]
