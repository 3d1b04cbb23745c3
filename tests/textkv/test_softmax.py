"""What a method makes of attention is what the model pays: soft caps and sinks count, in prompts and answers."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from eval.tiny import build
from tests.compare import mismatch
from tests.textkv import tiny
from textkv import MethodCache
from textkv.collector import EvidenceCollector
from textkv.decode_eviction import attention_row
from textkv.evidence import Needs
from textkv.kernels import window_mass
from textkv.reading import NAME, Recorder
from textkv.scores import past_mass
from textkv.segments.base import Step, Stored
from textkv.softmax import Softmax

METHODS = (
    "snapkv", "pyramidkv", "vl-cache", "cake(window=8)", "cake-official(window=8)", "kvcrush", "vatp", "critic", "d2o",
    "h2o", "tova", "rkv(window=4)", "snapkv+adakv", "cake(window=8)+mikv(16,4)",
)  # fmt: skip
CAP = 1e-30  # below it every score is +cap or -cap, and every query looks evenly, whatever it asks
WINDOW = 5


def capped(query_scale: float) -> Gemma2ForCausalLM:
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
        model = capped(query_scale)
        cache = MethodCache(model, method, budget)
        with torch.no_grad():
            model(ids[:, :56], past_key_values=cache)
            for token in ids[:, 56:].split(1, 1):
                model(token, past_key_values=cache)
        kept.append([layer.stored().positions.tolist() for layer in cache.context.layers])
    assert kept[0] == kept[1]


class Rows(Recorder):
    """Notes what a decoded token looked at."""

    def on_decode_end(self, layer, query):
        layer.notes[NAME] = attention_row(layer, query)


def sharp(family: str):
    """A tiny model whose queries choose and whose sinks weigh, and which tells its own attention."""
    torch.manual_seed(0)
    model = build(family)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "sinks" in name:
                weight.normal_(0, 2)
            if "q_proj.weight" in name or "k_proj.weight" in name:
                weight.mul_(4)
    model.set_attn_implementation("eager")
    return model


def governed(cache: MethodCache, told: tuple) -> list:
    """Pairs of a layer that a method governs and the weights [1, heads, m, n] that the model told of it."""
    told = [x for x in told if x is not None]
    every = cache.layers if len(told) == len(cache.layers) else cache.context.layers
    return [(layer, told[list(every).index(layer)]) for layer in cache.context.layers]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "flint", "cohere2", "qwen3_next", "granite"])
def test_evidence_is_the_models_own_attention(family):
    ids = torch.randint(1, 90, (1, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        own = sharp(family)(ids, output_attentions=True, use_cache=False).attentions
    model = sharp(family)
    cache = MethodCache(model, Recorder(asked=Needs(window=WINDOW, columns=True)))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for layer, weights in governed(cache, own):
        evidence = layer.notes[NAME]
        columns = weights.sum(2).unflatten(1, (layer.kv_heads, -1)).mean(2)
        assert not mismatch(evidence.columns, columns, atol=1e-4, rtol=1e-4)
        window = weights[:, :, -WINDOW:, :-WINDOW].sum(2)
        seen = past_mass(evidence.queries, layer.stored().keys, evidence.softmax)
        assert not mismatch(seen, window, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "flint"])
def test_a_decoded_tokens_row_is_the_models_own(family):
    ids = torch.randint(1, 90, (1, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        own = sharp(family)(ids, output_attentions=True, use_cache=False).attentions
    model = sharp(family)
    cache = MethodCache(model, Rows())
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        model(ids[:, -1:], past_key_values=cache)
    for layer, weights in governed(cache, own):
        assert not mismatch(layer.notes[NAME], weights[:, :, -1], atol=1e-4, rtol=1e-4)


def test_heads_that_hold_different_tokens_have_each_its_own_sinks():
    """The columns of a second block, head by head: with sinks that weigh nothing they are those of a model without."""
    ids, columns = torch.randint(1, 90, (1, 56), generator=torch.Generator().manual_seed(3)), []
    for size in (-1e4, None):
        model = sharp("gpt_oss")
        for layer in model.model.layers:
            layer.self_attn.sinks = torch.nn.Parameter(torch.full((4,), -1e4)) if size else None
        cache = MethodCache(model, "h2o+adakv(0.0)", 0.3)
        with torch.no_grad():
            model(ids[:, :40], past_key_values=cache)
            assert any(len(set(layer.lengths()[0].tolist())) > 1 for layer in cache.context.layers)
            columns.append(model(ids[:, 40:], past_key_values=cache).logits)
    assert not mismatch(*columns, atol=1e-4, rtol=1e-4)


def test_columns_of_a_head_are_under_its_own_sinks():
    """Of two KV heads the second stores two tokens less; its query heads are the third and the fourth."""
    q, keys, sinks = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 9, 8), torch.tensor([-3.0, -1.0, 1.0, 3.0])
    at = torch.arange(9, dtype=torch.int32).repeat(1, 2, 1)
    at[:, 1, :2] = -1
    new = keys[:, :, 6:]
    step = Step(q, new, new, torch.arange(6, 9, dtype=torch.int32)[None], 0.5, sinks=sinks)
    collector = EvidenceCollector(Needs(columns=True))
    collector.take(step, lambda: Stored(keys, keys, at))
    found = collector.finish(q, step.softmax, torch.tensor([9]), []).columns
    for head, first in ((0, 0), (1, 2)):
        own = slice(2 * head, 2 * head + 2)
        alone = window_mass(q[:, own], keys[:, head : head + 1, first:], scale=0.5, sinks=sinks[own])
        assert torch.allclose(found[0, head, first:], alone[0].mean(0), atol=1e-6)
    assert not found[0, 1, :2].any()


def test_weights_beside_a_sink():
    """Two keys of scores 0 and log 3 beside a sink of log 4: one, three and four of eight parts."""
    softmax = Softmax(2.0, None, torch.tensor([4.0]).log())
    scores = softmax.scores(torch.tensor([[[1.0, 3.0**0.5]]]).log())
    assert torch.allclose(softmax.weights(scores), torch.tensor([[[0.125, 0.375]]]))
