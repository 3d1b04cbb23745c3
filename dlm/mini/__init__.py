"""The embedded models of the diffusion wing: a small LLaDA, a small Dream and a small guider that solve arithmetic
word problems, and the LLaDA again that solves longer ones; their problems and weights (`training.dlm` made them).

`load_mini("llada")`, `load_mini("dream")`, `load_mini("guider")`, `load_mini("llada-hard")`, or a training's folder.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2ForCausalLM

from dlm.models import load_model
from textkv import checkpoints

KINDS = ("llada", "dream", "guider", "llada-hard")
WEIGHTS = Path(__file__).parent / "weights"


def load_mini(
    name: str | Path = "llada", dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model in eval mode, tokenizer): an embedded one of `KINDS`, or a folder that the training wrote.

    Raises:
        FileNotFoundError: there are no weights, or no tokenizer.
        ValueError: weights that are not whole (`textkv.checkpoints`).
    """
    folder = WEIGHTS / name if name in KINDS else Path(name)
    if not (folder / "model.safetensors").is_file():
        made = name if name in KINDS else "llada"
        how = "--minutes 180" if task_of(made) == "arithmetic" else f"--start {WEIGHTS / family_of(made)} --minutes 6"
        raise FileNotFoundError(
            f"no weights in {folder}; train them with `python -m training.dlm.train --model {made} {how}`"
        )
    # The guider is a plain Qwen2 of transformers; the other two are models of ours.
    if checkpoints.read_object(folder / "config.json").get("model_type") != "qwen2":
        model, tokenizer = load_model(folder, dtype=dtype, device=device)
        if tokenizer is None:
            raise FileNotFoundError(f"{folder} has no tokenizer; put its tokenizer.json into the folder")
        return model, tokenizer
    guider = checkpoints.load_model(Qwen2ForCausalLM.from_pretrained, folder, dtype=dtype)
    tokenizer = checkpoints.load_tokenizer(PreTrainedTokenizerFast.from_pretrained, folder, guider)
    return guider.to(device).eval(), tokenizer


def check_kind(kind: str) -> str:
    """`kind` itself; ValueError unless it is one of KINDS."""
    if kind not in KINDS:
        raise ValueError(f"model={kind!r} is not a mini model; use {', '.join(KINDS)}")
    return kind


def task_of(kind: str) -> str:
    """The task of `dlm.mini.problems` that a model is made for."""
    return "hard" if kind.endswith("-hard") else "arithmetic"


def family_of(kind: str) -> str:
    """ "llada", "dream" or "guider": whose graph a model has."""
    return kind.removesuffix("-hard")
