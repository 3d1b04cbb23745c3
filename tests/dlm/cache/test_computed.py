"""What is fed to the model is what the unfinished rows need: no finished row, no padding, no filler."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from dlm.decode import decode
from dlm.unmask import Guider
from tests.dlm.cache.test_rows import CACHES
from tests.dlm.toys import END, MASK, PAD, Rule, llada, prompts


def fed_rows(model) -> list[int]:
    """Numbers of tokens that the last layer's feed-forward is given, in this list from now on."""
    fed, ffn = [], model.layers[-1].ffn
    model.layers[-1].ffn = lambda hidden: fed.append(hidden.shape[0] * hidden.shape[1]) or ffn(hidden)
    return fed


RULES = {"quota": dict(unmask=Rule()), "threshold": dict(unmask="threshold(0.35)"), "run": dict(unmask=Rule(run=5))}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cache", CACHES)
def test_rows_of_very_different_lengths_cost_what_they_cost_alone(cache, rule):
    model = llada()
    ids, mask = prompts(2, 30, 11, 5)
    options = dict(gen_length=16, block_length=4, cache=cache, eos="stop", **RULES[rule])
    # A model that ends its texts early, each row at another place.
    model.head.weight.data[END] += 0.2
    alone = [decode(model, x[x != PAD][None], **options) for x in ids]
    fed = fed_rows(model)
    together = decode(model, ids, mask, **options)
    assert torch.equal(together.ids, torch.cat([one.ids for one in alone]))
    needed = sum(one.stats.query_tokens for one in alone)
    assert sum(fed) == together.stats.query_tokens == needed
    assert not bool((together.ids == MASK).any())


def guider() -> Guider:
    torch.manual_seed(1)
    config = Qwen2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16,
        vocab_size=24, max_position_embeddings=256,
    )  # fmt: skip
    return Guider(Qwen2ForCausalLM(config).eval())


@pytest.mark.parametrize("method", [None, "full"])
def test_finished_rows_leave_the_guider_too(method):
    model, guide = llada(), guider()
    guide = Guider(guide.model, method=method)
    ids, mask = prompts(3, 9, 5)
    model.head.weight.data[END] += 0.4
    options = dict(gen_length=12, block_length=4, cache="dual", guide=guide, unmask="guided('topk', k=8)")
    together = decode(model, ids, mask, **options)
    alone = [decode(model, x[x != PAD][None], **options) for x in ids]
    assert torch.equal(together.ids, torch.cat([one.ids for one in alone]))
    assert len({one.stats.forwards for one in alone}) > 1
    rounds = sum(one.stats.extra["guider_tokens"] for one in alone)
    # The guider reads every row as far as the longest draft of a round; finished rows it does not read at all.
    assert together.stats.extra["guider_tokens"] <= 1.1 * rounds or method is None
    assert together.stats.query_tokens == sum(one.stats.query_tokens for one in alone)
