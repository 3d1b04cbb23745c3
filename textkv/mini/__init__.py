"""The embedded text model: a small Llama that recalls facts from long prompts; its tasks and weights.

`training.text` made the weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from textkv.checkpoints import load_model, load_tokenizer

WEIGHTS = Path(__file__).parent / "weights"


def load_mini(
    folder: str | Path | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """(model in eval mode, tokenizer) of the embedded weights, or of another `folder` that the training wrote.

    Raises FileNotFoundError where there are no weights, ValueError where they are not whole (`textkv.checkpoints`).
    """
    folder = Path(folder) if folder else WEIGHTS
    if not (folder / "model.safetensors").exists():
        raise FileNotFoundError(f"no weights in {folder}; train them with `python -m training.text.train`")
    model = load_model(LlamaForCausalLM.from_pretrained, folder, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval(), load_tokenizer(PreTrainedTokenizerFast.from_pretrained, folder, model)
