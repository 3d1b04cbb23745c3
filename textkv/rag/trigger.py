"""When to retrieve: the attention scores of ATLAS (arXiv 2504.01281, section on MLAG), as functions of attention.

The printed formula sums attention of earlier tokens to a later one, which causal masking removes: it is 0 for every
model. `received` looks at the rows of later draft tokens instead, `outgoing` at the token's own row.
"""

from __future__ import annotations

import math

import torch

EPSILON = 1e-10


def load_factor(used: float, capacity: float, alpha0: float = 0.8, decay: float = 4.0) -> float:
    """alpha = alpha0 exp(-decay used / capacity): the fuller the memory, the rarer a retrieval.

    Raises:
        ValueError: a capacity of 0 or less.
    """
    if capacity <= 0:
        raise ValueError(f"capacity={capacity} holds nothing; give the bytes that may be used, above 0")
    return alpha0 * math.exp(-decay * used / capacity)


def gated(probability: float, counts: bool, most: float = 0.5) -> bool:
    """Gate 1: an unsure token (probability below `most`) that is a word of content."""
    return counts and probability < most


def printed(attention: torch.Tensor, token: int, probability: float) -> float:
    """The score as printed, without alpha; attention [layers, heads, n, n]. Zero wherever attention is causal."""
    columns = _columns(attention, token, slice(0, token))
    return _score(_gradient(columns, token), attention, token, probability, attention[-1, :, :token, token])


def received(attention: torch.Tensor, token: int, probability: float) -> float:
    """What later draft tokens pay to `token`; attention [layers, heads, n, n] of the whole draft, n > token + 1.

    Raises:
        ValueError: no token comes after it.
    """
    _check(attention, token)
    if token + 1 >= attention.shape[-1]:
        raise ValueError(f"token {token} is the last of the draft; received attention needs a later one")
    rows = attention[-1, :, token + 1 :, token]
    columns = _columns(attention, token, slice(token + 1, None))
    return _score(_gradient(columns, token), attention, token, probability, rows)


def outgoing(attention: torch.Tensor, token: int, probability: float) -> float:
    """How the token's own row moves from layer to layer (total variation); attention [layers, heads, n, n]."""
    _check(attention, token)
    rows = attention[:, :, token, : token + 1].mean(1)
    change = 0.5 * (rows[1:] - rows[:-1]).abs().sum(-1)
    return _score(
        (_depth(len(rows)) * change).sum(), attention, token, probability, attention[-1, :, token, :][:, None].amax(-1)
    )


def _check(attention: torch.Tensor, token: int) -> None:
    if attention.dim() != 4 or attention.shape[0] < 2:
        raise ValueError(f"attention {list(attention.shape)} is not [layers, heads, n, n] of 2 layers or more")
    if not 0 <= token < attention.shape[-1]:
        raise ValueError(f"token {token} lies outside of the draft of {attention.shape[-1]}")


def _depth(layers: int) -> torch.Tensor:
    return torch.arange(1, layers) / (layers - 1)


def _columns(attention: torch.Tensor, token: int, rows: slice) -> torch.Tensor:
    """[layers, token + 1]: attention that `rows` pay to each token up to `token`, summed over heads."""
    return attention[:, :, rows, : token + 1].sum((1, 2))


def _gradient(columns: torch.Tensor, token: int) -> torch.Tensor:
    share = columns[:, token] / columns.amax(-1).clamp_min(EPSILON)
    return (_depth(len(share)) * (share[1:] - share[:-1]).abs()).sum()


def _score(
    gradient: torch.Tensor, attention: torch.Tensor, token: int, probability: float, paid: torch.Tensor
) -> float:
    """gradient x (1 - p) x sum over heads of phi a; `paid` [heads, rows], of which the largest is a."""
    seen = attention[-1, :, : token + 1, : token + 1]
    entropy = -(seen * (seen + EPSILON).log()).sum((-1, -2))
    phi = entropy / entropy.sum().clamp_min(EPSILON)
    strongest = paid.amax(-1) if paid.shape[-1] else paid.new_zeros(len(paid))
    return float(gradient * (1 - probability) * (phi * strongest).sum())
