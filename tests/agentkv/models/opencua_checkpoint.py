"""A random OpenCUA checkpoint in the published layout, and what its network computes, in plain torch.

Nothing here uses the project's class or transformers' layers: names and formulas are written down a second time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from tests.agentkv.models.build import opencua_tokenizer, processor_settings, vocabulary, write_json

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a checkpoint; the defaults are tiny, `true_width` are those of the 7B."""

    hidden: int = 64
    mlp: int = 96
    heads: int = 4
    kv_heads: int = 2
    layers: int = 3
    seen: int = 32
    seen_mlp: int = 48
    seen_heads: int = 2
    blocks: int = 2
    full: tuple[int, ...] = (1,)
    window: int = 112
    patch: int = 14
    theta: float = 1e6

    @classmethod
    def true_width(cls) -> Shape:
        return cls(3584, 18944, 28, 4, 2, 1280, 3420, 16, 2)


def config(shape: Shape, tokenizer: PreTrainedTokenizerFast | None = None) -> dict:
    """config.json, with the keys and the left-overs that the published one has."""
    tokenizer = tokenizer or opencua_tokenizer()
    return {
        "architectures": ["OpenCUAForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_opencua.OpenCUAConfig", "AutoModel": "modeling_opencua.OpenCUA"},
        "model_type": "opencua",
        "ignore_index": -100,
        "media_placeholder_token_id": tokenizer.convert_tokens_to_ids("<|media_placeholder|>"),
        "pad_token_id": 0,
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "qwen2_5_vl", "depth": shape.blocks, "hidden_size": shape.seen, "hidden_act": "silu",
            "intermediate_size": shape.seen_mlp, "num_heads": shape.seen_heads, "out_hidden_size": shape.hidden,
            "patch_size": shape.patch, "spatial_merge_size": 2, "spatial_patch_size": shape.patch,
            "temporal_patch_size": 2, "window_size": shape.window, "fullatt_block_indexes": list(shape.full),
            "in_chans": 3,
        },
        "text_config": {
            "model_type": "qwen2", "vocab_size": vocabulary(tokenizer), "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads, "hidden_act": "silu", "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6, "rope_theta": shape.theta, "use_sliding_window": False, "sliding_window": 32768,
            "max_window_layers": shape.layers, "tie_word_embeddings": False,
        },
    }  # fmt: skip


def names(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the published layout with its size."""
    rows = vocabulary(opencua_tokenizer())
    seen, mlp, side = shape.seen, shape.seen_mlp, shape.hidden // shape.heads * shape.kv_heads
    found: dict[str, tuple[int, ...]] = {"vision_tower.patch_embed.proj.weight": (seen, 3, 2, shape.patch, shape.patch)}
    for i in range(shape.blocks):
        block = f"vision_tower.blocks.{i}."
        found |= {block + "norm1.weight": (seen,), block + "norm2.weight": (seen,)}
        for name, size in (("attn.qkv", (3 * seen, seen)), ("attn.proj", (seen, seen)), ("mlp.down_proj", (seen, mlp)),
                           ("mlp.gate_proj", (mlp, seen)), ("mlp.up_proj", (mlp, seen))):  # fmt: skip
            found |= {f"{block}{name}.weight": size, f"{block}{name}.bias": size[:1]}
    found["vision_tower.merger.ln_q.weight"] = (seen,)
    for number, size in ((0, (4 * seen, 4 * seen)), (2, (shape.hidden, 4 * seen))):
        found |= {f"vision_tower.merger.mlp.{number}.weight": size, f"vision_tower.merger.mlp.{number}.bias": size[:1]}
    text = "language_model.model."
    found |= {text + "embed_tokens.weight": (rows, shape.hidden), text + "norm.weight": (shape.hidden,)}
    for i in range(shape.layers):
        layer = f"{text}layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}{name}.weight"] = (shape.hidden,)
        for name, out in (("q", shape.hidden), ("k", side), ("v", side)):
            found |= {f"{layer}self_attn.{name}_proj.weight": (out, shape.hidden),
                      f"{layer}self_attn.{name}_proj.bias": (out,)}  # fmt: skip
        found[f"{layer}self_attn.o_proj.weight"] = (shape.hidden, shape.hidden)
        found |= {f"{layer}mlp.{name}_proj.weight": (shape.mlp, shape.hidden) for name in ("gate", "up")}
        found[f"{layer}mlp.down_proj.weight"] = (shape.hidden, shape.mlp)
    return found | {"language_model.lm_head.weight": (rows, shape.hidden)}


def weights(shape: Shape, seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, size in names(shape).items():
        noise = torch.randn(size, generator=generator)
        made[name] = 1 + 0.2 * noise if len(size) == 1 and "bias" not in name else noise * (noise[0].numel() ** -0.5)
    return made


def write(folder: Path, shape: Shape, made: Weights, tokenizer: bool = True) -> None:
    """The folder as it is downloaded: two shards and their index, configs, the tokenizer (converted, or code only)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder, "config.json", config(shape))
    images = processor_settings(shape.patch, (1, 1)) | {"min_pixels": 3136, "max_pixels": 28 * 28 * 64}
    del images["size"]  # published in the older spelling
    write_json(folder, "preprocessor_config.json", images)
    write_json(folder, "generation_config.json", {"max_length": 32768, "eos_token_id": 257})
    ordered = sorted(made)
    shards = {f"model-{n}-of-2.safetensors": ordered[n - 1 :: 2] for n in (1, 2)}
    for file, held in shards.items():
        save_file({name: made[name].contiguous() for name in held}, folder / file, metadata={"format": "pt"})
    index = {name: file for file, held in shards.items() for name in held}
    write_json(folder, "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    if tokenizer:
        opencua_tokenizer().save_pretrained(folder)
    code = {"AutoTokenizer": ["tokenization_opencua.TikTokenV3", None]}
    write_json(folder, "tokenizer_config.json", {"tokenizer_class": "TikTokenV3", "auto_map": code})
    (folder / "tokenization_opencua.py").write_text("raise RuntimeError('code of a checkpoint ran')\n")


def logits(shape: Shape, w: Weights, ids: torch.Tensor, pixels: torch.Tensor, grids: torch.Tensor, token: int):
    """Logits [tokens, vocabulary] of one prompt: ids [tokens], pixels [patches, values], grids [images, 3]."""
    text = "language_model.model."
    x = w[text + "embed_tokens.weight"][ids].clone()
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), grids.prod(1).cumsum(0)])
    parts = [
        screenshot(shape, w, pixels[starts[i] : starts[i + 1]], *grid[1:].tolist()) for i, grid in enumerate(grids)
    ]
    x[ids == token] = torch.cat(parts)
    size = shape.hidden // shape.heads
    # a token's angle depends on its place in the prompt alone, whether it is a word or a piece of a screenshot
    angles = torch.arange(len(ids))[:, None] / shape.theta ** (torch.arange(0, size, 2) / size)
    hidden_from = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    for i in range(shape.layers):
        p = f"{text}layers.{i}."
        normed = norm(x, w[p + "input_layernorm.weight"])
        q, k, v = (linear(w, f"{p}self_attn.{n}_proj", normed).unflatten(-1, (-1, size)) for n in "qkv")
        q, k = turned(q, angles), turned(k, angles)
        out = torch.empty_like(q)
        for head in range(shape.heads):
            group = head * shape.kv_heads // shape.heads
            scores = (q[:, head] @ k[:, group].T / size**0.5).masked_fill(hidden_from, -torch.inf)
            out[:, head] = scores.softmax(-1) @ v[:, group]
        x = x + linear(w, p + "self_attn.o_proj", out.flatten(1))
        normed = norm(x, w[p + "post_attention_layernorm.weight"])
        gate = F.silu(linear(w, p + "mlp.gate_proj", normed)) * linear(w, p + "mlp.up_proj", normed)
        x = x + linear(w, p + "mlp.down_proj", gate)
    return linear(w, "language_model.lm_head", norm(x, w[text + "norm.weight"]))


def screenshot(shape: Shape, w: Weights, pixels: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Visual tokens [rows/2 * columns/2, hidden] of one screenshot of rows x columns patches, four to a token."""
    # patches come in squares of two by two
    place = torch.arange(rows * columns).view(rows // 2, columns // 2, 2, 2)
    row, column = (
        (2 * torch.arange(rows // 2)[:, None, None, None] + torch.arange(2)[:, None]).expand_as(place).flatten(),
        (2 * torch.arange(columns // 2)[None, :, None, None] + torch.arange(2)).expand_as(place).flatten(),
    )
    size = shape.seen // shape.seen_heads
    slow = 10_000.0 ** -(torch.arange(0, size // 2, 2) / (size // 2))
    angles = torch.cat([row[:, None] * slow, column[:, None] * slow], 1)
    side = shape.window // shape.patch
    window = row // side * 1000 + column // side
    apart = window[:, None] != window
    x = pixels @ w["vision_tower.patch_embed.proj.weight"].flatten(1).T
    for i in range(shape.blocks):
        p = f"vision_tower.blocks.{i}."
        parts = linear(w, p + "attn.qkv", norm(x, w[p + "norm1.weight"])).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (-1, size)) for part in parts)
        q, k = turned(q, angles), turned(k, angles)
        scores = torch.einsum("ihd,jhd->hij", q, k) / size**0.5
        if i not in shape.full:
            scores = scores.masked_fill(apart, -torch.inf)
        x = x + linear(w, p + "attn.proj", torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1))
        normed = norm(x, w[p + "norm2.weight"])
        gate = F.silu(linear(w, p + "mlp.gate_proj", normed)) * linear(w, p + "mlp.up_proj", normed)
        x = x + linear(w, p + "mlp.down_proj", gate)
    p = "vision_tower.merger."
    four = norm(x, w[p + "ln_q.weight"]).reshape(-1, 4 * shape.seen)
    return linear(w, p + "mlp.2", F.gelu(linear(w, p + "mlp.0", four)))


def linear(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary turn of [tokens, heads, size] by angles [tokens, size / 2]."""
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
