"""The block-causal and expert models once more, independently: loops over tokens and heads in float64 from a state dict
with the published names; and their sampler, which computes everything anew at every step.
"""

from __future__ import annotations

import math
from typing import Any

import torch

State = dict[str, torch.Tensor]
SDAR: dict[str, Any] = {
    "architectures": ["SDARForCausalLM"], "attention_bias": False, "block_size": 4, "eos_token_id": 61, "head_dim": 8,
    "hidden_act": "silu", "hidden_size": 24, "intermediate_size": 40, "mask_token_id": 60, "model_type": "sdar",
    "max_position_embeddings": 256, "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000.0, "tie_word_embeddings": False,
    "vocab_size": 64, "use_sliding_window": False,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "sdar": SDAR,
    "sdar_moe": SDAR | {
        "model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"], "num_experts": 6, "num_experts_per_tok": 2,
        "moe_intermediate_size": 12, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "fast_dllm": SDAR | {
        "model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"], "attention_bias": True,
        "bd_size": 16, "block_size": None, "head_dim": None, "num_attention_heads": 3, "num_key_value_heads": 1,
    },
    "llada_moe": SDAR | {
        "model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "num_experts": 6, "num_experts_per_tok": 2,
        "expert_intermediate_size": 12, "num_key_value_heads": 4, "qk_layernorm": True, "norm_topk_prob": None,
        "moe_layer_freq": [1, 1],
        "block_size": None, "head_dim": None, "num_attention_heads": 4, "hidden_size": 32, "rope_theta": 50000.0,
    },
    "llada2": {
        "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "vocab_size": 64, "hidden_size": 24,
        "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 600000.0,
        "partial_rotary_factor": 0.5, "use_qk_norm": True, "use_qkv_bias": False, "use_bias": False,
        "moe_intermediate_size": 12, "num_experts": 8, "num_experts_per_tok": 3, "num_shared_experts": 1,
        "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "mask_token_id": 60,
        "eos_token_id": 61, "pad_token_id": 61, "tie_word_embeddings": False, "hidden_act": "silu",
    },
}  # fmt: skip
CONFIGS = {name: {k: v for k, v in c.items() if v is not None or k == "rope_scaling"} for name, c in CONFIGS.items()}


def block_of(family: str) -> int | None:
    return {"sdar": 4, "sdar_moe": 4, "fast_dllm": 16, "llada2": 32, "llada_moe": None}[family]


def head_dim(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Every key of the published layout with its shape."""
    c = CONFIGS[family]
    width, d, heads, kv = c["hidden_size"], head_dim(c), c["num_attention_heads"], c["num_key_value_heads"]
    embed = "word_embeddings" if family == "llada2" else "embed_tokens"
    found = {f"model.{embed}.weight": (64, width), "model.norm.weight": (width,), "lm_head.weight": (64, width)}

    def mlp(root: str, inner: int) -> dict[str, tuple[int, ...]]:
        return {f"{root}{n}_proj.weight": (width, inner) if n == "down" else (inner, width)
                for n in ("gate", "up", "down")}  # fmt: skip

    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        found |= {f"{at}{n}.weight": (width,) for n in ("input_layernorm", "post_attention_layernorm")}
        if family == "llada2":
            found |= {f"{at}attention.query_key_value.weight": ((heads + 2 * kv) * d, width),
                      f"{at}attention.dense.weight": (width, heads * d)}  # fmt: skip
            found |= {f"{at}attention.{n}_layernorm.weight": (d,) for n in ("query", "key")}
        else:
            sizes = {"q": heads * d, "k": kv * d, "v": kv * d}
            found |= {f"{at}self_attn.{n}_proj.weight": (size, width) for n, size in sizes.items()}
            found[f"{at}self_attn.o_proj.weight"] = (width, heads * d)
            if family == "fast_dllm":
                found |= {f"{at}self_attn.{n}_proj.bias": (size,) for n, size in sizes.items()}
            else:
                found |= {f"{at}self_attn.{n}_norm.weight": (d,) for n in "qk"}
        experts = c.get("num_experts", 0) if i >= c.get("first_k_dense_replace", 0) else 0
        if not experts:
            found |= mlp(f"{at}mlp.", c["intermediate_size"])
            continue
        inner = c.get("moe_intermediate_size") or c["expert_intermediate_size"]
        found[f"{at}mlp.gate.weight"] = (experts, width)
        for e in range(experts):
            found |= mlp(f"{at}mlp.experts.{e}.", inner)
        if family == "llada2":
            found[f"{at}mlp.gate.expert_bias"] = (experts,)
            found |= mlp(f"{at}mlp.shared_experts.", inner)
    return found


def random_state(family: str, seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(family).items():
        noise = torch.randn(shape, generator=generator)
        norm = len(shape) == 1 and name.endswith("weight")
        state[name] = 1 + 0.3 * noise if norm else noise * (0.3 if len(shape) == 1 else 1.5 * shape[-1] ** -0.5)
    return state


def logits(state: State, family: str, ids: list[int]) -> torch.Tensor:
    """[tokens, vocabulary] in float64 of one row."""
    c, two = CONFIGS[family], family == "llada2"
    d, heads, kv, eps = head_dim(c), c["num_attention_heads"], c["num_key_value_heads"], c["rms_norm_eps"]
    w = {name: tensor.double() for name, tensor in state.items()}
    block = block_of(family) or 10**9
    hidden = [w["model.word_embeddings.weight" if two else "model.embed_tokens.weight"][t] for t in ids]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        q, k, v = [], [], []
        for p, h in enumerate(hidden):
            x = _rms(h, w[at + "input_layernorm.weight"], eps)
            if two:
                rows = (w[at + "attention.query_key_value.weight"] @ x).view(-1, d)
                parts = [rows[:heads], rows[heads : heads + kv], rows[heads + kv :]]
                norms = [w[at + f"attention.{n}_layernorm.weight"] for n in ("query", "key")]
            else:
                parts = [(w[at + f"self_attn.{n}_proj.weight"] @ x + w.get(at + f"self_attn.{n}_proj.bias", 0))
                         .view(-1, d) for n in "qkv"]  # fmt: skip
                norms = [w.get(at + f"self_attn.{n}_norm.weight") for n in "qk"]
            for n, norm in enumerate(norms):
                if norm is not None:
                    parts[n] = torch.stack([_rms(row, norm, eps) for row in parts[n]])
                turned = int(d * c.get("partial_rotary_factor", 1))
                parts[n] = _turn(parts[n], turned, p, c["rope_theta"])
            q, k, v = q + [parts[0]], k + [parts[1]], v + [parts[2]]
        out = w[at + ("attention.dense.weight" if two else "self_attn.o_proj.weight")]
        for p in range(len(ids)):
            seen = [t for t in range(len(ids)) if t // block <= p // block]
            mixed = []
            for head in range(heads):
                g = head // (heads // kv)
                score = torch.stack([q[p][head] @ k[t][g] for t in seen]) / math.sqrt(d)
                mixed.append(sum(a * v[t][g] for a, t in zip(score.softmax(0), seen, strict=True)))
            h = hidden[p] + out @ torch.cat(mixed)
            hidden[p] = h + _ffn(w, c, two, at + "mlp.", _rms(h, w[at + "post_attention_layernorm.weight"], eps))
    return torch.stack([w["lm_head.weight"] @ _rms(h, w["model.norm.weight"], eps) for h in hidden])


def _ffn(w: State, c: dict[str, Any], two: bool, at: str, x: torch.Tensor) -> torch.Tensor:
    def swiglu(root: str) -> torch.Tensor:
        gate = w[root + "gate_proj.weight"] @ x
        return w[root + "down_proj.weight"] @ (gate * torch.sigmoid(gate) * (w[root + "up_proj.weight"] @ x))

    if at + "gate.weight" not in w:
        return swiglu(at)
    raw, top = w[at + "gate.weight"] @ x, c["num_experts_per_tok"]
    if not two:
        share = raw.softmax(0)
        chosen = sorted(range(len(raw)), key=lambda e: -share[e])[:top]
        total = sum(share[e] for e in chosen) if c.get("norm_topk_prob") else 1.0
        return sum(share[e] / total * swiglu(f"{at}experts.{e}.") for e in chosen)
    score = torch.sigmoid(raw)
    biased, size = score + w[at + "gate.expert_bias"], len(raw) // c["n_group"]
    groups = [sorted(biased[g * size : (g + 1) * size].tolist())[-2:] for g in range(c["n_group"])]
    best = sorted(range(len(groups)), key=lambda g: -sum(groups[g]))[: c["topk_group"]]
    chosen = sorted((e for e in range(len(raw)) if e // size in best), key=lambda e: -biased[e])[:top]
    total = sum(score[e] for e in chosen) + 1e-20
    routed = sum(score[e] / total * swiglu(f"{at}experts.{e}.") for e in chosen) * c["routed_scaling_factor"]
    return routed + swiglu(at + "shared_experts.")


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / math.sqrt(float((x * x).mean()) + eps)


def _turn(x: torch.Tensor, width: int, position: int, theta: float) -> torch.Tensor:
    out = x.clone()
    for j in range(width // 2):
        angle = position * theta ** (-2 * j / width)
        a, b = x[:, j], x[:, j + width // 2]
        out[:, j] = a * math.cos(angle) - b * math.sin(angle)
        out[:, j + width // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def edited(
    forward: Any, prompt: list[int], length: int, block: int, tau: float, edit: float, rounds: int
) -> tuple[list[int], int]:
    """LLaDA2.1's sampler: (the answer, forwards); blocks from position 0 on, no cache, no shift."""
    total = -(-(len(prompt) + length) // block) * block
    x, forwards = prompt + [60] * (total - len(prompt)), 0
    for low in range(len(prompt) // block * block, total, block):
        post = 0
        while True:
            masks = [p for p in range(low, low + block) if x[p] == 60]
            post += not masks
            if post > rounds:
                break
            z = forward(x[: low + block]).float()
            z[:, 60] = -torch.inf
            forwards += 1
            best = {p: z[p].softmax(0).max(0) for p in range(low, low + block)}
            sure = [p for p in masks if float(best[p].values) > tau]
            sure = sure or [max(masks, key=lambda p: (float(best[p].values), -p))] if masks else []
            old = [p for p in range(max(low, len(prompt)), low + block) if x[p] != 60]
            changed = [p for p in old if float(best[p].values) > edit and int(best[p].indices) != x[p]]
            for p in sure + changed:
                x[p] = int(best[p].indices)
            if not masks and not changed:
                break
    return x[len(prompt) : len(prompt) + length], forwards
