"""Tiny random models of every supported family, in fp32 and with a seed."""

from __future__ import annotations

from functools import cache

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

VOCAB = 120
IMAGE, VISION_START, VISION_END = 110, 111, 112
TEXT = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
TEXT_FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
VISION_FAMILIES = ("qwen2_5_vl", "qwen3_vl")


@cache
def build(family: str):
    """One model per family; tests share it and must leave its weights alone."""
    torch.manual_seed(0)
    model = _BUILDERS[family]().eval()
    # Random weights attend almost evenly; larger projections make keys matter, so wrong evictions show.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                weight.mul_(6)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _vision(cls, config_cls, vision: dict, sections: list[int]):
    text = {k: v for k, v in TEXT.items() if "token_id" not in k}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    if config_cls is Qwen3VLConfig:
        rope["mrope_interleaved"] = True
        text["head_dim"] = 16
    config = config_cls(
        text_config=text | {"rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE,
        vision_start_token_id=VISION_START, vision_end_token_id=VISION_END, video_token_id=113,
    )  # fmt: skip
    return cls(config)


_BUILDERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TEXT)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**TEXT, sliding_window=None)),
    "qwen2_5_vl": lambda: _vision(
        Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig,
        dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, fullatt_block_indexes=[1]),
        [2, 3, 3],
    ),
    "qwen3_vl": lambda: _vision(
        Qwen3VLForConditionalGeneration, Qwen3VLConfig,
        dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, patch_size=14,
             deepstack_visual_indexes=[0], num_position_embeddings=64),
        [4, 2, 2],
    ),
}  # fmt: skip


def text_ids(n: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random ordinary ids [batch, n]."""
    return torch.randint(1, 100, (batch, n), generator=torch.Generator().manual_seed(seed))


def screens(frames: int, seed: int = 0, text: int = 5, grid: tuple[int, int] = (4, 6)):
    """A prompt with `frames` screenshots between pieces of text: processor-like inputs and the spans' columns."""
    g = torch.Generator().manual_seed(seed)
    merged = grid[0] * grid[1] // 4
    ids, spans = torch.randint(1, 100, (text,), generator=g).tolist(), []
    for _ in range(frames):
        ids.append(VISION_START)
        spans.append((len(ids), len(ids) + merged))
        ids += [IMAGE] * merged + [VISION_END] + torch.randint(1, 100, (text,), generator=g).tolist()
    ids = torch.tensor([ids])
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).long()}
    if frames:
        inputs["pixel_values"] = torch.randn(frames * grid[0] * grid[1], 3 * 2 * 14 * 14, generator=g)
        inputs["image_grid_thw"] = torch.tensor([[1, *grid]] * frames)
    return inputs, [spans]
