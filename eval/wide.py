"""UI-TARS-1.5-7B's shapes with random weights and few layers: what a step costs there, without the checkpoint.

Width, heads, MLP and vision tower are those of the published configuration, only less deep; the vocabulary, the chat
and the tokenizer are the embedded model's, which a step's cost does not depend on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from agentkv.agent import Agent, Decision
from agentkv.envs.actions import Wait
from agentkv.models import MINI, History
from agentkv.models.ui_tars import UiTarsAdapter

PIXELS = {"shortest_edge": 100 * 784, "longest_edge": 16384 * 784}
TEXT = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
    "max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "bos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip
VISION = {
    "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584, "window_size": 112,
}  # fmt: skip


def wide_agent(layers: int, device: str, seed: int = 0) -> UiTarsAdapter:
    """An agent of that width with `layers` text layers and as many vision blocks, the last of which sees everything;
    fp32 on a CPU, bf16 on a GPU.
    """
    tokenizer = AutoTokenizer.from_pretrained(MINI)
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=TEXT
        | {
            "vocab_size": len(tokenizer),
            "num_hidden_layers": layers,
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
        },
        vision_config=VISION | {"depth": layers, "fullatt_block_indexes": [layers - 1]},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if "cuda" in device else torch.float32
    model = Qwen2_5_VLForConditionalGeneration(config).to(device, dtype).eval()
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    return UiTarsAdapter(model, tokenizer, Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=PIXELS))


class Waiting:
    """An agent whose answers cost what they cost and move nothing: random weights say nothing that could be done."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent

    def start(self, env: Any) -> None:
        """See `agentkv.agent.Policy`."""
        self.agent.start(env)

    def decide(self, goal: str, history: History, screenshot: Image.Image, viewport: tuple[int, int]) -> Decision:
        """The agent's own answer, but the page stays as it is."""
        said = self.agent.decide(goal, history, screenshot, viewport)
        # Another wait at each step: an agent that repeats itself is stopped.
        return replace(said, action=Wait(len(history) / 1000), left_out="")
