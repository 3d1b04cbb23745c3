"""The networks once more, independently: plain loops over tokens and heads in float64, straight from a state dict with
the published names. No module of ours, no fused attention, RoPE by the sine and cosine of each angle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Graph:
    """Where the weights are and what the config says; `layer` has a place for the index."""

    embed: str
    layer: str
    norm: str
    head: str
    parts: tuple[str, ...]  # input norm, q, k, v, out, ffn norm, gate, up, down: without ".weight"
    heads: int
    kv_heads: int
    layers: int
    eps: float
    theta: float


def llada(heads: int, layers: int, eps: float = 1e-5, theta: float = 5e5) -> Graph:
    parts = ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out")
    root = "model.transformer."
    return Graph(
        root + "wte", root + "blocks.{}.", root + "ln_f", root + "ff_out", parts, heads, heads, layers, eps, theta
    )


def dream(heads: int, kv_heads: int, layers: int, eps: float = 1e-6, theta: float = 1e6) -> Graph:
    attention = tuple(f"self_attn.{x}_proj" for x in "qkvo")
    mlp = tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))
    parts = ("input_layernorm", *attention, "post_attention_layernorm", *mlp)
    return Graph(
        "model.embed_tokens", "model.layers.{}.", "model.norm", "lm_head", parts, heads, kv_heads, layers, eps, theta
    )


def logits(
    state: State, graph: Graph, ids: list[int], positions: list[int] | None = None, visible: list[bool] | None = None
) -> torch.Tensor:
    """[tokens, vocabulary] in float64 of one row of ids; `visible` says which tokens may be seen as keys."""
    positions = list(range(len(ids))) if positions is None else positions
    visible = [True] * len(ids) if visible is None else visible
    hidden = [state[graph.embed + ".weight"][token].double() for token in ids]
    for index in range(graph.layers):
        names = [graph.layer.format(index) + part for part in graph.parts]
        normed = [_rms(h, _tensor(state, names[0]), graph.eps) for h in hidden]
        placed = list(zip(normed, positions, strict=True))
        queries = [_rotated(_linear(state, names[1], x), graph.heads, p, graph.theta) for x, p in placed]
        keys = [_rotated(_linear(state, names[2], x), graph.kv_heads, p, graph.theta) for x, p in placed]
        values = [_linear(state, names[3], x).view(graph.kv_heads, -1) for x in normed]
        for t, query in enumerate(queries):
            mixed = torch.cat([_attend(query, keys, values, h, graph, visible) for h in range(graph.heads)])
            hidden[t] = hidden[t] + _linear(state, names[4], mixed)
        for t, h in enumerate(hidden):
            x = _rms(h, _tensor(state, names[5]), graph.eps)
            gate, up = _linear(state, names[6], x), _linear(state, names[7], x)
            hidden[t] = h + _linear(state, names[8], gate / (1 + torch.exp(-gate)) * up)
    return torch.stack([_linear(state, graph.head, _rms(h, _tensor(state, graph.norm), graph.eps)) for h in hidden])


def _tensor(state: State, name: str) -> torch.Tensor:
    return state[name + ".weight"].double()


def _linear(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    y = _tensor(state, name) @ x
    bias = state.get(name + ".bias")
    return y if bias is None else y + bias.double()


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / math.sqrt(float((x * x).mean()) + eps)


def _rotated(x: torch.Tensor, heads: int, position: int, theta: float) -> torch.Tensor:
    x = x.view(heads, -1)
    half = x.shape[1] // 2
    out = torch.empty_like(x)
    for j in range(half):
        angle = position * theta ** (-2 * j / x.shape[1])
        a, b = x[:, j], x[:, j + half]
        out[:, j] = a * math.cos(angle) - b * math.sin(angle)
        out[:, j + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def _attend(
    query: torch.Tensor, keys: list, values: list, head: int, graph: Graph, visible: list[bool]
) -> torch.Tensor:
    kv_head = head // (graph.heads // graph.kv_heads)
    seen = [t for t in range(len(keys)) if visible[t]]
    scores = [float(query[head] @ keys[t][kv_head]) / math.sqrt(query.shape[1]) for t in seen]
    weights = [math.exp(s - max(scores)) for s in scores]
    return sum(w / sum(weights) * values[t][kv_head] for w, t in zip(weights, seen, strict=True))
