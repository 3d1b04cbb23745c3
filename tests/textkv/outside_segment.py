"""A segment from elsewhere: keys and values wait in host memory, and each step fetches the ones that it looks at most.

Written against the public contract alone (`textkv.segments.base`), as somebody outside would write it. Small summaries
of the keys could stay on the device; here whole keys do, so that the choice is exact and only values are fetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from textkv import Capabilities, Method, register
from textkv.segments.base import Segment, Step, Stored, register_segment, shown
from textkv.segments.dense import DenseSegment


@register_segment("host_topk")
class HostSegment(Segment):
    """Prompt tokens: keys [batch, kv_heads, n, head_dim] on the device, values in host memory.

    Args:
        held: the tokens.
        k: how many values a query fetches per head.
    """

    def __init__(self, held: Stored, k: int) -> None:
        self.k = k
        self.keys, self.positions = held.keys.clone(), held.positions.clone()
        self.values = held.values.to("cpu", copy=True)

    def append(self, step: Step) -> None:
        raise RuntimeError("new tokens go to the segment behind this one")

    def is_empty(self) -> bool:
        return not self.keys.shape[2]

    def attend(self, q, scale, *, softcap=None, hidden=None):
        batch, heads, n, dim = self.keys.shape
        m = q.shape[2]
        # [batch, kv_heads, group * m, n]: every query chooses for itself
        grouped = q.unflatten(1, (heads, -1)).flatten(2, 3).float()
        scores = grouped @ self.keys.float().mT * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        scores = scores.masked_fill(~shown(self.positions, hidden)[:, :, None], -torch.inf)
        best, index = scores.topk(min(self.k, n), dim=-1)
        rows = torch.arange(batch)[:, None, None, None], torch.arange(heads)[None, :, None, None]
        fetched = self.values[(*rows, index.cpu())].to(q.device).float()
        lse = best.logsumexp(-1)
        weights = (best - lse[..., None]).exp().nan_to_num()  # a query that sees nothing here: -inf - -inf
        out = (weights[..., None, :] @ fetched)[..., 0, :]
        return out.to(q.dtype).reshape(batch, -1, m, dim), lse.reshape(batch, -1, m)

    def keep(self, index: torch.Tensor) -> None:
        pick = index.expand(-1, self.keys.shape[1], -1)
        slots = pick.clamp(min=0)[..., None].expand(-1, -1, -1, self.keys.shape[3])
        self.positions = self.positions.gather(2, pick.clamp(min=0)).masked_fill(pick < 0, -1)
        self.keys, self.values = self.keys.gather(2, slots), self.values.gather(2, slots.cpu())

    def stored(self) -> Stored:
        return Stored(self.keys, self.values.to(self.keys.device), self.positions)

    def held_positions(self) -> torch.Tensor:
        return self.positions

    def lengths(self) -> torch.Tensor:
        return (self.positions >= 0).sum(-1).cpu()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"keys": self.keys, "positions": self.positions} | self.host_tensors()

    def host_tensors(self) -> dict[str, torch.Tensor]:
        return {"values": self.values}

    def take_rows(self, rows: torch.Tensor) -> None:
        self.keys, self.values, self.positions = (
            x.index_select(0, rows.to(x.device)) for x in (self.keys, self.values, self.positions)
        )

    def crop(self, tokens: int, real: torch.Tensor | None = None) -> None:
        if tokens:
            raise ValueError("the tokens of a prompt are not taken back one by one")


@register("host_topk")
@dataclass(frozen=True)
class HostTopK(Method):
    """Moves each prompt block to the host when it ends; decoded tokens stay on the device until the next block does.

    Attributes:
        k: tokens of the past that a query looks at, per head.
    """

    k: int = 64

    capabilities: ClassVar[Capabilities] = Capabilities(lossy=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise ValueError(f"k={self.k}: fetch at least one token")

    @property
    def evicts(self) -> bool:
        return False

    def on_prefill_end(self, layer, evidence) -> None:
        layer.replace([HostSegment(layer.stored(), self.k), DenseSegment()])
