"""The trained mini agent with Qwen2.5's key biases: it must answer from a four-bit cache what it answers from the full.

Its model is a Qwen2.5-VL. As in `eval.biased`, every rotary pair gets a twin of the same rate and axis that holds the
negative of its bias, and queries read both alike: the bias cancels in every score and nowhere else.
"""

from __future__ import annotations

import random

import torch
from PIL import Image
from torch import nn

from agentkv.models import ModelAdapter, load_adapter
from textkv import MethodCache
from training.agent.drawn import drawn_turn

NORMS = (605.0, 22.0, 921.0)  # first layer, those between, last
PAGES, ASKS = 10, 4
SMALL = "kivi(4,group=16,residual=16)"  # blocks that fit into what gui-kv keeps here


@torch.no_grad()
def bias_keys(model: nn.Module, seed: int = 0) -> None:
    """Widens every head of the text model to twice its channels, in place, and gives its keys a bias on all pairs."""
    text = model.model.language_model
    generator = torch.Generator().manual_seed(seed)
    for number, layer in enumerate(text.layers):
        attention, dim = layer.self_attn, layer.self_attn.head_dim
        own = attention.k_proj.bias.view(-1, 2, dim // 2)
        phase = torch.rand(len(own), dim // 2, generator=generator) * 2 * torch.pi
        large = torch.stack([phase.cos(), phase.sin()], 1)
        norm = NORMS[0 if number == 0 else 2 if number == len(text.layers) - 1 else 1]
        large *= norm / (2 * large.square().sum()).sqrt()
        for name, twin in (("q_proj", "same"), ("k_proj", "none"), ("v_proj", "none")):
            setattr(attention, name, _wide(getattr(attention, name), dim, twin))
        attention.k_proj.bias.copy_(torch.stack([own - large, large], -1).flatten())
        heads = attention.o_proj.weight.unflatten(1, (-1, 2, dim // 2))
        out = nn.Linear(2 * attention.o_proj.in_features, attention.o_proj.out_features, bias=False)
        out.weight.copy_(torch.stack([heads, torch.zeros_like(heads)], -1).flatten(1))
        attention.o_proj, attention.head_dim = out, 2 * dim
    rotary = text.rotary_emb
    rotary.inv_freq = rotary.inv_freq.repeat_interleave(2)
    rotary.mrope_section = [2 * size for size in rotary.mrope_section]
    text.config.rope_parameters["mrope_section"] = rotary.mrope_section


def _wide(linear: nn.Linear, dim: int, twin: str) -> nn.Linear:
    """Channel 2 i of each half of a head is the old i, 2 i + 1 its twin: the same again, or nothing."""
    made = nn.Linear(linear.in_features, 2 * linear.out_features)
    for name in ("weight", "bias"):
        heads = getattr(linear, name).unflatten(0, (-1, 2, dim // 2))
        other = heads if twin == "same" else torch.zeros_like(heads)
        getattr(made, name).copy_(torch.stack([heads, other], 3).flatten(0, 3))
    return made


@torch.inference_mode()
def answers(adapter: ModelAdapter, method: str, budget: float = 1.0) -> list[str]:
    """Replies to questions about drawn pages."""
    rng, texts = random.Random(1_000_000), []
    for _ in range(PAGES):
        turn = drawn_turn(rng)
        for ask in turn.asks[:ASKS]:
            prompt = adapter.prompt(ask.goal, [], Image.fromarray(turn.image))
            cache = MethodCache(adapter.model, method, budget)
            cache.begin(**prompt.inputs, spans=[prompt.spans])
            out = adapter.model.generate(**prompt.inputs, past_key_values=cache, max_new_tokens=24, do_sample=False)
            texts.append(adapter.tokenizer.decode(out[0, prompt.inputs["input_ids"].shape[1] :]))
    return texts


def same(ours: list[str], theirs: list[str]) -> float:
    """Share of equal replies."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(theirs)


def test_four_bits_answer_as_if_there_were_no_bias() -> None:
    adapter = load_adapter("mini", device="cpu", dtype=torch.float32)
    full, packed = answers(adapter, "full"), answers(adapter, "kivi(4)")
    selected = answers(adapter, f"gui-kv+{SMALL}", 0.4)
    bias_keys(adapter.model)
    # a reply in a near tie falls as the processor rounds: each bar is five or more of the 40 replies from what was seen
    assert same(answers(adapter, "full"), full) >= 0.85
    turned = same(answers(adapter, "kivi(4)"), full)
    assert turned >= 0.75 and turned >= same(packed, full) - 0.15
    assert same(answers(adapter, f"gui-kv+{SMALL}", 0.4), full) >= same(selected, full) - 0.2
    assert same(answers(adapter, "kivi(4,centre='fixed')"), full) <= turned - 0.2
