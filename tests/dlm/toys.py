"""Tiny models and the simplest rules, for tests of caches and of the loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from dlm import unmask
from dlm.decode import decode
from dlm.models import DecodingSpec, DreamConfig, DreamModel, LLaDAConfig, LLaDAModelLM
from dlm.models.llada import LLaDALayer

VOCAB, MASK, END, PAD = 24, 23, 22, 21


def llada(layers: int = 2, seed: int = 0) -> LLaDAModelLM:
    config = LLaDAConfig(
        d_model=32, n_layers=layers, n_heads=4, mlp_hidden_size=48, vocab_size=VOCAB, max_sequence_length=256,
        rope_theta=100.0, mask_token_id=MASK, eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip
    return _lively(LLaDAModelLM(config), seed)


def dream(layers: int = 2, seed: int = 0) -> DreamModel:
    config = DreamConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=VOCAB, max_position_embeddings=256, rope_theta=100.0, mask_token_id=MASK, eos_token_id=END,
        pad_token_id=PAD,
    )  # fmt: skip
    return _lively(DreamModel(config), seed)


def _lively(model, seed: int):
    """Weights large enough that tokens, positions and staleness all show in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                spread = 1.0 if "wte" in name or "embed" in name else 1.3 * weight.shape[1] ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
    return model.eval()


class BlockCausalLayer(LLaDALayer):
    """Sees nothing of later blocks; the prompt is a block of its own."""

    prompt = block = 0

    def attend(self, query, key, value, mask=None):
        slots = torch.arange(query.shape[2])
        if not isinstance(key, torch.Tensor):
            layer, plan = key.layer, key.layer.cache.plan
            layer.write(key.k, key.v, plan)
            slots = slots + plan.queries.start
            key, value = layer.k, layer.v

        def number(slot):
            return torch.where(slot < self.prompt, -1, (slot - self.prompt) // self.block)

        visible = number(torch.arange(key.shape[2]))[None] <= number(slots)[:, None]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=self.scaling)
        return self.to_out(out.transpose(1, 2).flatten(2))


def block_causal(prompt: int, block: int, seed: int = 0) -> LLaDAModelLM:
    """A LLaDA in which no block sees a later one: caches of finished blocks are exact there."""
    model = llada(3, seed)
    for layer in model.layers:
        layer.__class__ = BlockCausalLayer
        layer.prompt, layer.block = prompt, block
    return model


class Counter:
    """No network: counts the rows that it is asked for and puts out noise that depends on the slot alone."""

    def __init__(self, shift: int = 0, vocab: int = 4) -> None:
        self.decoding_spec = DecodingSpec(vocab - 1, (), vocab - 2, shift, None, "confidence")
        self.rows, self.shapes, self.noise = 0, [], torch.rand(4096, vocab, generator=torch.Generator().manual_seed(1))

    def __call__(self, input_ids, *, position_ids, past_key_values, logits_rows, attention_mask):
        self.rows += input_ids.shape[1]
        self.shapes.append(input_ids.shape[1])
        return SimpleNamespace(logits=self.noise[position_ids.gather(1, logits_rows)])


@dataclass(frozen=True)
class Rule(unmask.Rule):
    """Commits the `quota` most probable masks of the active block, and all above `threshold`.

    With `run` it reads from the first mask to the end of the logit window instead and commits 1 to `run` tokens from
    the left, how many depending on the row's own tokens: like a guided rule, across blocks.
    """

    quota: int = 1
    threshold: float = 2.0
    run: int = 0
    seen: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    name = "toy"

    def begin(self, canvas, spec, generator, steps):
        return Unmasker(self)


class Unmasker(unmask.Unmasker):
    stats = {"guider_forwards": 7, "note": "toy"}

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def candidates(self, canvas, logit_window):
        low, high = canvas.block_start(canvas.active), canvas.block_start(canvas.active + 1)
        if self.rule.run:
            high = logit_window[1]
        slots = torch.arange(canvas.length, device=canvas.ids.device).expand(canvas.batch, -1)
        wanted = canvas.masked() & (slots >= low[:, None]) & (slots < high[:, None])
        assert bool(
            (slots >= logit_window[0][:, None])[wanted].all() and (slots < logit_window[1][:, None])[wanted].all()
        )
        return slots.masked_fill(~wanted, -1)

    def choose(self, logits, slots, canvas):
        wanted = slots >= 0
        logits = logits.float().index_fill(-1, torch.tensor(canvas.mask_id), -torch.inf)
        self.rule.seen.append((slots.clone(), logits.masked_fill(~wanted[..., None], 0)))
        best = logits.softmax(-1).max(-1)
        value = best.values.masked_fill(~wanted, -1)
        rank = value.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        commit = wanted & ((rank < self.rule.quota) | (value > self.rule.threshold))
        if self.rule.run:
            first = wanted.int().argmax(1, keepdim=True)
            count = 1 + best.indices.gather(1, first) % self.rule.run
            commit = wanted & (torch.arange(wanted.shape[1])[None] < first + count)
        return unmask.Choice(best.indices, commit)


def traced(model, prompt, cache, rule=None, **options):
    """decode() and the logits that every forward gave: a list of (slots, logits)."""
    rule = rule or Rule()
    options = {"gen_length": 12, "block_length": 4, "eos": "none", **options}
    return decode(model, prompt, cache=cache, unmask=rule, **options), rule.seen


def prompts(*lengths: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), PAD), torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(0, PAD, (length,), generator=generator)
        mask[row, width - length :] = 1
    return ids, mask
