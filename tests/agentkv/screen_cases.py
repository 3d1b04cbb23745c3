"""Layers and evidence of one prompt with screenshots, made by hand or by a seed, for methods that score them."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from textkv.evidence import Evidence
from textkv.screens import ScreenStates, inside
from textkv.segments.base import Stored


def held(keys: torch.Tensor) -> Stored:
    batch, heads, n, _ = keys.shape
    return Stored(keys, torch.zeros_like(keys), torch.arange(n, dtype=torch.int32).expand(batch, heads, n))


def layer_of(stored: Stored) -> SimpleNamespace:
    """What the methods ask of a layer: its tokens, and room for what they learn."""
    rows, heads, _ = stored.positions.shape
    return SimpleNamespace(
        index=0, kv_heads=heads, device=stored.keys.device, real_seen=torch.zeros(rows), trajectory={}, statistics={},
        stored=lambda: stored, held_positions=lambda: stored.positions,
    )  # fmt: skip


def evidence(queries: torch.Tensor, states: torch.Tensor, spans: list, grids: list) -> Evidence:
    """Of one row: queries [1, heads, w, d], hidden states [1, n, hidden]."""
    n = states.shape[1]
    at = torch.arange(n, dtype=torch.int32)[None]
    here = inside(at[0], spans)
    return Evidence(
        queries, queries.shape[-1] ** -0.5, torch.tensor([n]), states.norm(dim=-1), at, None, [spans], grids=[grids],
        states=ScreenStates(states[:, here], at[:, here]),
    )  # fmt: skip


SPANS, GRIDS = [(4, 20), (22, 38), (40, 56)], [(4, 4)] * 3


def random_case(seed: int = 0, kv_heads: int = 2, group: int = 2, n: int = 60, window: int = 4, spans=None, grids=None):
    """A layer and its evidence; three screenshots of 4 x 4 tokens unless told otherwise."""
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, kv_heads, n, 16, generator=g)
    queries = torch.randn(1, kv_heads * group, window, 16, generator=g)
    states = torch.randn(1, n, 24, generator=g)
    spans, grids = (SPANS, GRIDS) if spans is None else (spans, grids)
    stored = held(keys)
    return layer_of(stored), stored, evidence(queries, states, spans, grids)


def kept(scores: torch.Tensor, count: int) -> list[int]:
    return sorted(scores.sort(descending=True, stable=True).indices[:count].tolist())
