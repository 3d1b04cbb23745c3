"""Fast-dLLM's own code (arXiv 2505.22618) beside ours: the model and the generations of a user's checkout.

What is in the folder is run in this process, with all rights of the user who names it, because the user names it:
read it first. Nothing is fetched, and no code that came with weights is run. Its classes stay under a private name and
transformers' tables are left as they were, so that "llada" still means the class that it meant before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from dlm.models.llada import FIXED

LIBRARY = "Fast-dLLM"
GENERATIONS = {"none": "generate", "prefix": "generate_with_prefix_cache", "dual": "generate_with_dual_cache"}
"""Our cache policies, and which of the authors' functions is the same."""
_PRIVATE = "_fast_dllm"
_FOLDERS = ("llada", "v1/llada")
_FILES = ("generate.py", "model/modeling_llada.py", "model/configuration_llada.py")
_SIZES = (
    "d_model", "n_heads", "n_kv_heads", "n_layers", "mlp_hidden_size", "vocab_size", "embedding_size",
    "max_sequence_length", "rope_theta", "rms_norm_eps", "eos_token_id", "pad_token_id", "mask_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class Checkout:
    """The modules of a checkout.

    Attributes:
        modeling: with `LLaDAModel`, `LLaDAModelLM` and their config.
        generations: with the functions of `GENERATIONS`.
    """

    modeling: ModuleType
    generations: ModuleType

    @classmethod
    def of(cls, folder: Path) -> Checkout:
        """Runs what lies in `folder`, a checkout of Fast-dLLM's repository.

        Raises:
            ValueError: the files are not there, or cannot be run with what is installed.
        """
        found = [folder / part for part in _FOLDERS if all((folder / part / file).is_file() for file in _FILES)]
        if not found:
            places = " or ".join(_FOLDERS)
            raise ValueError(f"{folder} is no checkout of {LIBRARY}: it has no {places} with {', '.join(_FILES)}")
        try:
            with _importing(found[0]):
                return cls(import_module(f"{_PRIVATE}.model.modeling_llada"), import_module(f"{_PRIVATE}.generate"))
        except Exception as error:
            # Whatever a stranger's file raises is said in one line.
            told = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(f"{folder}: the checkout does not run with the packages installed here: {told}") from error

    def model(self, ours: PreTrainedModel) -> PreTrainedModel:
        """Their model with the weights of our LLaDA, which are shared and not copied."""
        fixed = {name: allowed[0] for name, allowed in FIXED.items() if allowed[0] is not None}
        sizes = {name: getattr(ours.config, name) for name in _SIZES}
        config = self.modeling.LLaDAConfig(**sizes, **fixed, flash_attention=False)
        # Theirs reads a field that newer configurations do not keep.
        config.use_cache = False
        shape = replace(self.modeling.create_model_config_from_pretrained_config(config), init_device="meta")
        model = self.modeling.LLaDAModelLM(config, self.modeling.LLaDAModel(shape, init_params=False))
        model.load_state_dict(ours.state_dict(), assign=True)
        return model.eval()

    def answer(self, cache: str) -> Callable[..., tuple[torch.Tensor, int]]:
        """The authors' function for a cache of `GENERATIONS`: (model, prompt, steps, gen_length, block_length, ..) ->
        (ids int64 [1, P + G], forwards)."""
        return getattr(self.generations, GENERATIONS[cache])


@contextmanager
def _importing(folder: Path) -> Iterator[None]:
    """Lets `folder` be imported as a package of a private name, and as "model", as its own scripts do."""
    packages = {_PRIVATE: folder, f"{_PRIVATE}.model": folder / "model"}
    for name in [name for name in sys.modules if name.partition(".")[0] == _PRIVATE]:
        del sys.modules[name]
    for name, place in packages.items():
        module: Any = ModuleType(name)
        module.__path__ = [str(place)]
        sys.modules[name] = module
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "model"}
    sys.modules["model"] = sys.modules[f"{_PRIVATE}.model"]
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        with patch.object(AutoConfig, "register"), patch.object(AutoModel, "register"):
            yield
    finally:
        sys.dont_write_bytecode = written
        for name in [name for name in sys.modules if name.partition(".")[0] == "model"]:
            del sys.modules[name]
        sys.modules |= before
