"""What a model says to a request to serve it before its weights are read: it is built without them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from textkv.cache import MethodCache
from textkv.capacity import ModelShape
from textkv.checkpoints import check_layers, load_tokenizer, readable_files
from textkv.models.atoms import is_atoms
from textkv.models.loading import MINI, resolve
from textkv.serve.interface import Opening

SHORT = 64  # tokens of a conversation that memory must hold at least


def check_text_model(opening: Opening, method: str) -> None:
    """Raises ValueError or FileNotFoundError unless there is a text model with a chat template, whose caches this
    method can keep, see `check_cache`.
    """
    place = resolve(opening.model)
    if opening.model != MINI and opening.chat_template is None:
        check_template(load_tokenizer(AutoTokenizer.from_pretrained, place).chat_template)
    # Of a model by matrix atoms transformers cannot tell what it is.
    if not is_atoms(place):
        with readable_files(place):
            check_layers(place)
            config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        check_cache(lambda: AutoModelForCausalLM.from_config(config, trust_remote_code=False), config, opening, method)


def check_template(template: str | None) -> None:
    """Raises ValueError if there is no chat template."""
    if not template:
        raise ValueError(
            "the tokenizer has no chat template, so messages cannot be told; give one: --chat-template FILE"
        )


def check_cache(build: Callable[[], PreTrainedModel], config: PreTrainedConfig, opening: Opening, method: str) -> None:
    """Raises ValueError unless caches of a method can be kept of the model that `build` makes, and the memory holds
    one short conversation.

    Args:
        config: the model's.
    """
    with torch.device("meta"), readable_files(opening.model):
        model = build().to(opening.dtype).eval()
    # What does not fit into memory goes elsewhere, if it may.
    if opening.memory is not None and opening.disk is None and not opening.host:
        _check_memory(lambda: model, config, opening, method)
    # A cache looks at the tables of rotary angles: at their shape, the numbers play no part here.
    for module in model.modules():
        for name, table in module.named_buffers(recurse=False):
            setattr(module, name, torch.ones(table.shape, dtype=table.dtype))
    # What is computed with weights, a key that is turned for a proof, shows when they are there.
    with suppress(RuntimeError):
        MethodCache(model, method, opening.budget)


def _check_memory(
    build: Callable[[], PreTrainedModel], config: PreTrainedConfig, opening: Opening, method: str
) -> None:
    try:
        shape = ModelShape.of(build, config, opening.dtype)
    except ValueError:  # no size is known, which is no reason to refuse a model
        return
    try:
        tokens, least = SHORT, shape.kv_bytes(method, opening.budget, SHORT)
    except ValueError:  # no formula for this method, but none holds less than that of a conversation
        tokens, least = 1, shape.full_bytes(1)
    if opening.memory < least:
        raise ValueError(
            f"--memory of {opening.memory:,} bytes holds no conversation of {tokens} tokens with {method}, which is "
            f"{least:,}; give more, as 8GB"
        )
