"""The JSON files of the agent's model folder: the layout of any Qwen2.5-VL checkpoint plus agent.json."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from training.agent.shape import MAX_PIXELS, MERGE, MIN_PIXELS, PATCH

SYSTEM = "GUI agent"
AGENT = {"agent": "ui-tars", "system": SYSTEM, "prompt": "{goal}", "history_frames": 9, "answer_tokens": 64}


def folder_files(tokenizer: PreTrainedTokenizerBase, cache: str) -> dict[str, dict[str, Any]]:
    """By name: what `agentkv.models.load_adapter` reads beside the weights and the tokenizer; `cache`: which one the
    agent runs with by itself.
    """
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    return {
        "generation_config": {"do_sample": False, "eos_token_id": ends, "pad_token_id": ends[1]},
        "preprocessor_config": processor_settings(),
        "agent": AGENT | {"cache": cache},
    }


def processor_settings() -> dict[str, Any]:
    """The image processor's settings (preprocessor_config.json)."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
