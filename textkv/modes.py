"""torch's modes around a layer: autocast, which is over when keys arrive, and gradients, which end there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def exactly(device: str) -> AbstractContextManager:
    """Autocast has had its say when keys and values arrive: from here on dtypes are ours to choose."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class Undifferentiable(torch.autograd.Function):
    """Hands an output on; a backward pass through it is an error instead of a silently missing gradient."""

    @staticmethod
    def forward(ctx, q: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`out` as it is; `q` is an input so that the output asks for gradients."""
        return out.view_as(out)

    @staticmethod
    def backward(ctx, *grads):
        """Raises RuntimeError: tokens that are stored keep no graph."""
        raise RuntimeError(
            "no gradients flow through a cache that a method keeps: train without past_key_values (use_cache=False)"
        )
