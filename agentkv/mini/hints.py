"""Hints for the trainer: half-way through the text layers every visual token is asked what it shows and where that is.

Answers alone tell the model very little about a picture (one point for a whole page); on drawn pages the box and the name
of everything are known, so all visual tokens can learn at once. The two small heads live in training only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLForConditionalGeneration


class Hints:
    """Two linear heads on visual tokens [N, tokens, hidden] and their own optimizer."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, rate: float) -> None:
        text = model.config.text_config
        self.norm = torch.nn.RMSNorm(text.hidden_size)
        self.place = torch.nn.Linear(text.hidden_size, 2)
        self.name = torch.nn.Linear(text.hidden_size, text.vocab_size)
        parameters = [*self.norm.parameters(), *self.place.parameters(), *self.name.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98))
        self.errors: list[float] = []
        self.hits: list[float] = []

    def loss(self, looked: torch.Tensor, hints: torch.Tensor) -> torch.Tensor:
        """Loss of place and name over the tokens with a hint; hints [N, tokens, 3] as in `Packed`."""
        self.optimizer.zero_grad(set_to_none=True)
        known = ~hints[..., 0].isnan()
        if not bool(known.any()):
            return looked.new_zeros(())
        states, truth = self.norm(looked[known]), hints[known]
        names, places = self.name(states), self.place(states)
        self.errors.append((places.detach() - truth[:, :2]).abs().mean().item())
        self.hits.append((names.detach().argmax(-1) == truth[:, 2].long()).float().mean().item())
        near = F.smooth_l1_loss(places, truth[:, :2], beta=0.05)
        return 10 * near + 0.5 * F.cross_entropy(names, truth[:, 2].long())

    def step(self) -> None:
        """Move the heads by the gradient of the last loss."""
        self.optimizer.step()

    def line(self) -> str:
        """Mean error of places (share of the screen) and share of right names since the last call."""
        count = max(len(self.errors), 1)
        text = f"hints {sum(self.errors) / count:.3f} {sum(self.hits) / count:.2f}"
        self.errors.clear()
        self.hits.clear()
        return text
