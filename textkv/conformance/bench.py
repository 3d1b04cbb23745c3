"""The bench of the checks: one method at one budget on one small model, with fixed token ids."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from textkv.budgets import Budget
from textkv.cache import MethodCache
from textkv.method import Method, resolve_method

TOLERANCE = 2e-4
"""Largest difference of logits that still counts as equal: what sums in another order make of fp32."""


class NotApplicable(Exception):
    """The method declares that it does not do this; the declaration itself was checked where possible."""


class Bench:
    """One method, one budget, one model, and fixed token ids."""

    def __init__(self, method: str, budget: Budget | float | str, model: PreTrainedModel) -> None:
        self.method, self.budget, self.model = method, budget, model
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, model.config.get_text_config().vocab_size, (3, 96), generator=generator)
        self.policy: Method = resolve_method(method, budget)

    def cache(self, budget: Budget | float | str | None = None) -> MethodCache:
        """A cache of the method, at the bench's own budget unless another is given."""
        return MethodCache(self.model, self.method, self.budget if budget is None else budget)

    @property
    def enough(self) -> float | str:
        """A budget for everything, of the same kind as the one under test."""
        if self.policy.budget.tokens is None:
            return 1.0
        # More than the prompt, but not more than the model knows: some methods refuse that.
        return f"{min(1000, self.model.config.get_text_config().max_position_embeddings)}t"

    def plain(self) -> DynamicCache:
        """transformers' own cache for the model."""
        return DynamicCache(config=self.model.config)

    def run(self, cache, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [batch, tokens, vocabulary] of one forward; padding positions as `generate` would give them."""
        options = {}
        if mask is not None:
            # Counted without padding, as `generate` does: else rows of other lengths would not be comparable.
            at = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            options = {"attention_mask": mask, "position_ids": at}
        with torch.no_grad():
            return self.model(ids, past_key_values=cache, **options).logits

    def decode(self, cache, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of feeding ids one token at a time: [batch, tokens, vocabulary]."""
        steps = []
        for i in range(ids.shape[1]):
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            steps.append(self.run(cache, ids[:, i : i + 1], mask))
        return torch.cat(steps, 1)


def same(ours: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raises AssertionError unless logits are alike within TOLERANCE."""
    gap = (ours - expected).abs().max().item()
    assert gap <= TOLERANCE, f"logits of {what} differ by {gap:.2g}"


def refused(action: Callable[[], None], what: str) -> None:
    """Raises AssertionError unless the action raises ValueError."""
    try:
        action()
    except ValueError:
        return
    raise AssertionError(f"no ValueError: {what}")


def small_llama() -> PreTrainedModel:
    """A random Llama of three layers with grouped heads, in fp32."""
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    torch.random.set_rng_state(generator_state)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Random projections attend almost evenly; sharper ones let a wrong eviction show.
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(6)
    return model
