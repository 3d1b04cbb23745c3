"""Hints for the trainer: where an answer should look, and which cell of the screen a visual token is.

A click names one point of a whole page, which alone teaches a small model to point very slowly. The drawn and the
recorded pages know the place, so one group of heads of one text layer is asked to look at it while the numbers are
said, and every visual token is asked for its own row and column. Both live in training only; the model's own forward
pass is untouched.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from training.agent.forward import Reading, rotate
from training.agent.packing import Batch
from training.agent.shape import CELLS


class Hints(torch.nn.Module):
    """The linear head for cells and both losses."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cell = torch.nn.Linear(hidden, CELLS[0] * CELLS[1])

    def forward(self, batch: Batch, reading: Reading, image_token_id: int) -> torch.Tensor:
        """Sum of both losses, a scalar."""
        seen = reading.hidden[batch.ids == image_token_id].view(-1, self.cell.out_features, reading.hidden.shape[-1])
        cells = torch.arange(self.cell.out_features, device=seen.device).expand(seen.shape[:2])
        loss = F.cross_entropy(self.cell(F.rms_norm(seen, seen.shape[-1:])).flatten(0, 1), cells.flatten())
        return loss - looks(batch, reading).add(1e-6).log().mean() if len(batch.hints) else loss


def looks(batch: Batch, reading: Reading) -> torch.Tensor:
    """Attention [hints] that the first KV head's queries pay to the hinted visual token, averaged over these heads."""
    attention = reading.layer.self_attn
    rows, queries, keys = batch.hints.unbind(1)
    states, (cos, sin) = reading.layer.input_layernorm(reading.hidden), reading.angles
    width, heads = attention.head_dim, attention.num_key_value_groups
    key = rotate(F.linear(states, attention.k_proj.weight[:width], attention.k_proj.bias[:width]), cos, sin)
    size = heads * width
    query = F.linear(states[rows, queries], attention.q_proj.weight[:size], attention.q_proj.bias[:size])
    query = rotate(query.view(-1, heads, width), cos[rows, queries][:, None], sin[rows, queries][:, None])
    scores = query @ key[rows].transpose(1, 2) / math.sqrt(width) + reading.mask[rows, :, queries]
    return scores.softmax(-1).gather(2, keys[:, None, None].expand(-1, heads, 1)).mean((1, 2))
