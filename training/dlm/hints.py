"""Hints for the trainer: what a written digit depends on.

A sum is learned late when only its digits are taught, because the model must first find the two digits to add. The
problems know where these stand, so in one layer the heads are shown the places, one head per part of the sum: the
total so far, the change, the mark, the sign. Only what is visible is hinted at. Training only: the model's forward is
untouched.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from dlm.models.backbone import Layer
from training.dlm.feed import Batch

TOTAL, CHANGE, MARK, SIGN = range(4)  # heads
Place = tuple[int, int]
"""(slot, -1) of the answer, or (number, 0 for its tens or 1 for its ones) of the prompt with the number below 0."""


def dependencies(steps: int) -> list[tuple[int, int, Place]]:
    """(slot, head, place that the slot depends on) for the answer to a problem of so many steps.

    Slots count from the start of the answer; a place in the prompt is (-1 - number, digit), in the answer (slot, -1).
    """
    # Layout of an answer: =ab, a sign and two digits, =ab ... The ones come before the tens.
    found = [(1, TOTAL, (-1, 1)), (3, TOTAL, (-1, 0))]
    ones, tens = 1, 3
    for step in range(1, steps + 1):
        sign = 7 * step - 3
        found += [(sign + 1, CHANGE, (-1 - step, 1)), (sign + 2, CHANGE, (-1 - step, 0))]
        for slot in (sign + 4, sign + 5):  # the new ones and the mark
            found += [(slot, TOTAL, (ones, -1)), (slot, CHANGE, (sign + 1, -1)), (slot, SIGN, (sign, -1))]
        found += [(sign + 6, TOTAL, (tens, -1)), (sign + 6, CHANGE, (sign + 2, -1))]
        found += [(sign + 6, MARK, (sign + 5, -1)), (sign + 6, SIGN, (sign, -1))]
        ones, tens = sign + 4, sign + 6
    return [*found, (7 * steps + 5, TOTAL, (tens, -1)), (7 * steps + 6, TOTAL, (ones, -1))]


def numbers_of(ids: torch.Tensor, digit: torch.Tensor) -> torch.Tensor:
    """Columns of the tens and ones of each number in prompts int64 [rows, columns]: int64 [rows, numbers, 2].

    A number of one digit gives its column twice. `digit` bool [vocab] says which ids are digits; every row must hold
    the same count of numbers.
    """
    is_digit = digit[ids]
    # A word or a stop stands between any two numbers and none is at a row's edge: nothing wraps around.
    starts = is_digit & ~torch.roll(is_digit, 1, 1)
    ends = is_digit & ~torch.roll(is_digit, -1, 1)
    columns = [marks.nonzero()[:, 1].view(len(ids), -1) for marks in (starts, ends)]
    return torch.stack(columns, -1)


def hints_of(batch: Batch, hidden: torch.Tensor, digit: torch.Tensor) -> torch.Tensor:
    """int64 [k, 4] as (row, head, slot column, source column), columns of the whole row.

    Args:
        hidden: bool [rows, slots], answer slots that are to be filled in (a guider: all).
        digit: bool [vocab], which ids are digits.
    """
    steps = (batch.answer - 8) // 7
    numbers = numbers_of(batch.ids[:, : batch.prompt], digit)
    rows = torch.arange(len(batch.ids))
    found = []
    for slot, head, (place, which) in dependencies(steps):
        wanted = hidden[:, slot].clone()
        if which < 0:
            source = torch.full_like(rows, batch.prompt + place)
            # A diffusion model cannot look at a digit that is hidden itself; a guider sees all that comes before.
            wanted &= ~hidden[:, place] if not bool(hidden.all()) else True
        else:
            source = numbers[:, -1 - place, which]
        columns = (rows, torch.full_like(rows, head), torch.full_like(rows, batch.prompt + slot), source)
        found.append(torch.stack(columns, -1)[wanted])
    return torch.cat(found)


class Watch:
    """Keeps what goes into one layer of a model during a forward, for `loss`. `shift`: row j stands for slot j + 1."""

    def __init__(self, layer: nn.Module, shift: int, causal: bool) -> None:
        self.layer, self.shift, self.causal = layer, shift, causal
        self._seen: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None = None
        layer.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        # Evaluations run through the same hook without gradients and must not keep their states.
        if torch.is_grad_enabled():
            self._seen = args[0], kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]

    def loss(self, hints: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Mean -log attention at the hinted places; fp32 scalar. `visible` bool [rows, columns], False = padding."""
        hidden, rope = self._seen
        self._seen = None
        row, head, slot, source = hints.to(hidden.device).unbind(1)
        query, key = self._project(hidden, rope)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = (query @ key.mT).float() * query.shape[-1] ** -0.5
        shut = ~visible.to(hidden.device)[:, None, None]
        if self.causal:
            shut = shut | torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        # Finite, so that a row of padding alone gives numbers; nobody is hinted at there.
        scores = scores.masked_fill(shut, torch.finfo(torch.float32).min)
        return -scores.log_softmax(-1)[row, head, slot - self.shift, source].mean()

    def _project(self, hidden: torch.Tensor, rope: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated queries and keys [rows, heads, columns, head_dim]."""
        layer = self.layer
        if isinstance(layer, Layer):
            return layer.qk(layer.input_norm(hidden), rope)
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        heads = (p(normed).unflatten(-1, (-1, attention.head_dim)) for p in (attention.q_proj, attention.k_proj))
        return apply_rotary_pos_emb(*(x.transpose(1, 2) for x in heads), *rope)
