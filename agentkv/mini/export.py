"""Write the model folder that `agentkv.models.load_adapter` reads: the layout of any Qwen2.5-VL checkpoint plus
agent.json.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from agentkv.mini.shape import MAX_PIXELS, MERGE, MIN_PIXELS, PATCH

SYSTEM = "GUI agent"
AGENT = {"agent": "ui-tars", "system": SYSTEM, "prompt": "{goal}", "history_frames": 9, "answer_tokens": 64}


def export(
    model: Qwen2_5_VLForConditionalGeneration,
    weights: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    scalars: dict,
) -> None:
    """Write `weights` (named as the model's parameters) as a loadable folder, each file replaced atomically."""
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    config = model.config.to_dict() | {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "dtype": "float32"}
    _json(draft / "config.json", config)
    ends = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    _json(draft / "generation_config.json", {"do_sample": False, "eos_token_id": ends, "pad_token_id": ends[1]})
    _json(draft / "preprocessor_config.json", processor_settings())
    _json(draft / "agent.json", AGENT | {"trained": scalars})
    tokenizer.save_pretrained(draft)
    save_file(_published(model, weights), draft / "model.safetensors", metadata={"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    for path in draft.iterdir():
        path.chmod(0o644)
        os.replace(path, folder / path.name)
    draft.rmdir()


def processor_settings() -> dict:
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


def _published(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in fp16 (loading widens them again), without the tied projection (it is the embedding)."""
    skip = "lm_head.weight"
    return {name: tensor.detach().half().cpu().contiguous() for name, tensor in weights.items() if name != skip}


def _json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
