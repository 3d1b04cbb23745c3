"""Feed-forwards of several experts, of which a router chooses a few for each token.

Two routers. Softmax (LLaDA-MoE, SDAR-MoE): the k most probable experts, with their probabilities. Sigmoid in groups
(LLaDA2): scores plus a stored bias choose first the groups, then the experts in them; the weights are the scores
without that bias. Modules are named as in the published checkpoints: one module for each expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) of [.., width]."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[.., width]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SoftmaxRouter(nn.Linear):
    """The `top` most probable of `experts`; `renormalise` makes their weights sum to 1."""

    def __init__(self, width: int, experts: int, top: int, renormalise: bool) -> None:
        super().__init__(width, experts, bias=False)
        self.top, self.renormalise = top, renormalise

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts int64 [n, top] of tokens x [n, width], and their weights fp32."""
        weights, chosen = super().forward(x).softmax(-1, dtype=torch.float32).topk(self.top, -1)
        return chosen, weights / weights.sum(-1, keepdim=True) if self.renormalise else weights


class GroupRouter(nn.Linear):
    """The `top` experts with the best biased sigmoid scores out of the `top_groups` best of `groups`.

    A group is as good as the sum of its two best biased scores. The bias only chooses.
    """

    def __init__(
        self, width: int, experts: int, top: int, groups: int = 1, top_groups: int = 1, scale: float = 1.0
    ) -> None:
        super().__init__(width, experts, bias=False)
        self.register_buffer("expert_bias", torch.zeros(experts))
        self.top, self.groups, self.top_groups, self.scale = top, groups, top_groups, scale

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts int64 [n, top] of tokens x [n, width], and their weights fp32."""
        # fp32 as published: with 256 experts bf16 scores tie, and the choice would depend on the device.
        score = F.linear(x.float(), self.weight.float()).sigmoid()
        biased = (score + self.expert_bias.float()).unflatten(-1, (self.groups, -1))
        best = biased.topk(2, -1).values.sum(-1).topk(self.top_groups, -1).indices
        closed = torch.ones_like(biased[..., 0], dtype=torch.bool).scatter(-1, best, False)
        chosen = biased.masked_fill(closed[..., None], -torch.inf).flatten(-2).topk(self.top, -1).indices
        weights = score.gather(-1, chosen)
        if self.top > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * self.scale


class Experts(nn.Module):
    """A router `gate`, its `experts`, and perhaps `shared_experts` that every token passes, unweighted."""

    def __init__(self, gate: nn.Module, width: int, inner: int, count: int, shared: int = 0) -> None:
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList(SwiGLU(width, inner) for _ in range(count))
        if shared:
            self.shared_experts = SwiGLU(width, inner * shared)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, q, width]; each token by its own experts, so no token depends on the others of its batch."""
        flat = x.flatten(0, -2)
        chosen, weights = self.gate(flat)
        out = torch.zeros_like(flat)
        # Only experts that somebody chose: of 256 a block of 32 tokens asks for fewer than all.
        for number in chosen.unique().tolist():
            tokens, place = (chosen == number).nonzero(as_tuple=True)
            part = self.experts[number](flat[tokens]) * weights[tokens, place, None].to(flat.dtype)
            out.index_add_(0, tokens, part)
        out = out.view_as(x)
        return out + self.shared_experts(x) if hasattr(self, "shared_experts") else out
