"""What a caller may get wrong: one line that says so, before the first forward or as soon as it can be known."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from dlm.decode import decode
from dlm.prompts import gap_ids
from tests.dlm.toys import VOCAB, llada, prompts

IDS, REAL = prompts(3, 5)


def causal() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=1, max_position_embeddings=64)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(input_ids=IDS.tolist()), "input_ids is a list; give a tensor"),
        (dict(attention_mask=REAL.tolist()), "attention_mask is a list; give a tensor"),
        (dict(attention_mask=(REAL - 1.0) * 1e9), "attention_mask holds numbers below 0"),
        (dict(model="mini"), "model is 'mini', which has no decoding_spec"),
        (dict(model=causal()), "model is a Qwen2ForCausalLM, which has no decoding_spec"),
        (dict(guide="mini"), "guide='mini' is no model"),
        (dict(temperature=1e-45), "temperature=1e-45 is below 1e-30"),
        (dict(generator=[torch.Generator()] * 2), "two rows have the same generator"),
        (dict(logits_hook=lambda canvas, slots, logits: None), "logits_hook gave None; it must return"),
        (dict(logits_hook=lambda canvas, slots, logits: logits[0]), r"logits_hook gave a tensor of shape \[4, 24\]"),
    ],
)
def test_one_line_says_what_is_wrong(given, message):
    call = dict(model=llada(), input_ids=IDS, attention_mask=REAL, gen_length=4) | given
    with pytest.raises(ValueError, match=message):
        decode(**call)


@pytest.mark.parametrize("rule", ["confidence", "origin", "threshold(0.3)", "klass", "edit", "ssd(2)", "wino(0.2,0.3)"])
def test_logits_that_are_no_numbers_are_no_text(rule):
    model = llada()
    model.head.weight.data[3, 0] = torch.nan  # of one word: softmax spreads it over all
    with pytest.raises(ValueError, match="the logits hold NaN"):
        decode(model, IDS, REAL, gen_length=4, cache="dual", unmask=rule)


def test_no_stop_strings_may_be_none():
    assert torch.equal(decode(llada(), IDS, REAL, gen_length=4, stop=None).ids,
                       decode(llada(), IDS, REAL, gen_length=4).ids)  # fmt: skip


@pytest.mark.parametrize("odd", ["<mask:1.5>", "<mask:-1>", "<mask: 3>", "<MASK:3>", "<mask:three"])
def test_a_misspelt_gap_beside_a_good_one_is_not_text(odd):
    class Words:
        mask_token_id = 2

        def __call__(self, text, **options):
            return {"input_ids": [5] * len(text.split())}

    with pytest.raises(ValueError, match="is no gap; write <mask:8>"):
        gap_ids(Words(), f"tom has <mask:2> and {odd} pears")
    assert gap_ids(Words(), '<mask id="round"> holds <mask:2>')[-2:] == [2, 2]
