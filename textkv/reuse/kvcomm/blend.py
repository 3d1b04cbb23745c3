"""The KV of a text in a new context, estimated from anchors (arXiv 2510.12872, Eq. 6 and 7, in the canonical frame).

The released code keeps offsets of keys in the absolute positions of their anchor's request, and adds them to keys at
others: right only where a placeholder always starts at the same position. Here bases and offsets are canonical, and
keys are turned once, when the prompt is put together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from textkv.reuse.kvcomm.anchors import Anchor, Criteria
from textkv.reuse.spans import Span

Turn = Callable[[torch.Tensor, int], torch.Tensor]


def blended(
    text: Span, behind: Span | None, anchors: Sequence[Anchor], agent: str, criteria: Criteria, turned: Turn
) -> tuple[Span, Span | None]:
    """The base of a text and of the fixed piece behind it, with the anchors' offsets added.

    Args:
        text: base KV of the text; every anchor has at least as many tokens.
        behind: base KV of the fixed piece that follows it; None = it is not wanted.
        anchors: one or more, with offsets of `agent`.
        turned: moves keys by a number of positions (`Spans.turned`).
    """
    if not anchors:
        return text, behind
    n = text.tokens
    offsets = [anchor.offsets[agent] for anchor in anchors]
    own, after = [], []
    for x, of_anchor in ((text.keys, "keys"), (text.values, "values")):
        bases = [getattr(anchor.base, of_anchor) for anchor in anchors]
        by_token = criteria.weights(torch.stack([_of_tokens(x, base[:, :, :n], criteria) for base in bases]))
        own.append(_added(x, [getattr(o.own, of_anchor)[:, :, :n] for o in offsets], by_token[:, None, None, :, None]))
        if behind is None:
            continue
        # Last tokens lie at other positions of the anchor's frame: compared in the text's.
        ends = [base[:, :, base.shape[2] - n :] for base in bases]
        if of_anchor == "keys":
            ends = [turned(end, n - base.shape[2]) for end, base in zip(ends, bases, strict=True)]
        by_channel = criteria.weights(torch.stack([_of_channels(x, end, criteria) for end in ends]))
        following = getattr(behind, of_anchor)
        after.append(_added(following, [getattr(o.behind, of_anchor) for o in offsets], by_channel[..., None, :]))
    return Span(*own), None if behind is None else Span(*after)


def _of_tokens(text: torch.Tensor, anchor: torch.Tensor, criteria: Criteria) -> torch.Tensor:
    """Distance of each token over all layers, heads and channels: fp32 [tokens]."""
    apart = text.float() - anchor.float()
    if criteria.distance == "paper":
        return apart.abs().mean((0, 1, 3))
    return apart.square().mean((0, 1, 3)).sqrt() / text.float().square().mean().sqrt().clamp(min=1e-12)


def _of_channels(text: torch.Tensor, anchor: torch.Tensor, criteria: Criteria) -> torch.Tensor:
    """Distance of each layer, head and channel over all tokens: fp32 [layers, kv_heads, head_dim]."""
    apart = (text.float() - anchor.float()).norm(dim=2)
    if criteria.distance == "paper" or not text.shape[2]:  # an empty text is like any other
        return apart
    size = text.float().square().mean((2, 3), keepdim=True)[..., 0].sqrt().clamp(min=1e-12)
    return apart / text.shape[2] ** 0.5 / size


def _added(base: torch.Tensor, offsets: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """base + sum of weights * offsets, in fp32 and rounded once. The first layer stays: there KV depends on token and
    position alone, so that the base is exact."""
    out = base.float().clone()
    for offset, weight in zip(offsets, weights, strict=True):
        # Anchor by anchor: a stack of all would be as large as the pool.
        out[1:] += weight.expand(len(out), -1, -1, -1)[1:] * offset[1:].float()
    return out.to(base.dtype)
