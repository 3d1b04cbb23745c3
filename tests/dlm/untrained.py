"""Folders of the three mini models at a quarter of their width, with random weights, as the training writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dlm.mini import KINDS
from training.dlm import shape
from training.dlm.tokenizer import build_tokenizer
from training.export import export


def make(root: Path) -> Path:
    """`root` with the folders "llada", "dream" and "guider"."""
    tokenizer = build_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shape, "WIDTH", 32)
        patch.setattr(shape, "INNER", 64)
        patch.setattr(shape, "LAYERS", {"llada": 2, "dream": 2, "guider": 1})
        for kind in KINDS:
            torch.manual_seed(0)
            model = shape.fresh_model(kind, tokenizer)
            export(model, dict(model.named_parameters()), tokenizer, root / kind, {})
    return root
