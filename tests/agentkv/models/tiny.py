"""Tiny models of every architecture that an agent is made on, with random weights; and one that says a script."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
)

from agentkv.envs.actions import Action, Click, Finished, Several, Type
from agentkv.grammars import Frame, fuzz
from agentkv.models import AGENTS
from agentkv.models.chat import ChatAdapter
from agentkv.models.opencua_model import OpenCuaConfig
from tests.agentkv.models import opencua_checkpoint
from tests.agentkv.models.build import fill, opencua_tokenizer, processor, qwen_tokenizer, vocabulary

PIXELS = {14: (784, 784 * 60), 16: (1024, 1024 * 60)}
_SEEN = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
_TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1,
    "bos_token_id": None,
}  # fmt: skip


def _rope(sections: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections, **more}}


def _marks(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {"image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"), "video_token_id": 0,
            "vision_start_token_id": 1, "vision_end_token_id": 2}  # fmt: skip


def _qwen2_5(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    text = {**_TEXT, "vocab_size": vocabulary(tokenizer), "num_hidden_layers": 2, **_rope([4, 2, 2])}
    seen = {**_SEEN, "fullatt_block_indexes": [1], "window_size": 112}
    return Qwen2_5_VLConfig(text_config=text, vision_config=seen, **_marks(tokenizer))


def _qwen3(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    text = {**_TEXT, "vocab_size": vocabulary(tokenizer), "num_hidden_layers": 2, "head_dim": 16, **_rope([4, 2, 2])}
    seen = {**_SEEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    return Qwen3VLConfig(text_config=text, vision_config=seen, **_marks(tokenizer))


def _qwen3_5(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
              "linear_value_head_dim": 16}  # fmt: skip
    rope = _rope([2, 1, 1], partial_rotary_factor=0.5, mrope_interleaved=True)
    text = {**_TEXT, **linear, "vocab_size": vocabulary(tokenizer), "num_hidden_layers": 4, "head_dim": 16, **rope}
    seen = {**_SEEN, "num_position_embeddings": 16}
    return Qwen3_5Config(text_config=text, vision_config=seen, **_marks(tokenizer))


def _opencua(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    return OpenCuaConfig(**opencua_checkpoint.config(opencua_checkpoint.Shape(), tokenizer))


# what the models of the tests say, so that their words are few tokens
_ACTS = (Several((Click(200, 120), Type("lamp\n"))), Click(900, 500), Finished("done"), Finished())
_FRAME = Frame((1280, 720), (1280, 720))
SAYINGS = [grammar.render(act, _FRAME) for grammar in fuzz.GRAMMARS.values() for act in (*_ACTS[:2], _ACTS[3])] * 3

CONFIGS: dict[str, Callable[[PreTrainedTokenizerFast], PreTrainedConfig]] = {
    "qwen2_5_vl": _qwen2_5,
    "qwen3_vl": _qwen3,
    "qwen3_5": _qwen3_5,
    "opencua": _opencua,
}


@cache
def parts(model_type: str, architecture: type[PreTrainedModel]) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """(model, tokenizer) of an architecture, made once."""
    texts = [text for kind in AGENTS.values() for text in (kind.words.system, kind.words.prompt)] + SAYINGS
    tokenizer = (opencua_tokenizer if model_type == "opencua" else qwen_tokenizer)(*texts)
    model = fill(architecture._from_config(CONFIGS[model_type](tokenizer), dtype=torch.float32))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def tiny(kind: type[ChatAdapter]) -> ChatAdapter:
    """The agent on a tiny model of its architecture."""
    model, tokenizer = parts(kind.model_type, kind.architecture)
    patch = model.config.vision_config.patch_size
    return kind(model, tokenizer, processor(patch, PIXELS[patch]))


class _Forced(LogitsProcessor):
    """Lets only the next token of a text through."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = iter(ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, next(self.ids)] = 0.0
        return forced


class Scripted:
    """An adapter whose model says the script's actions in its own grammar, one a decision; all else is real."""

    def __init__(self, adapter: ChatAdapter, script: Iterable[Action]) -> None:
        self.adapter, self.script, self.said = adapter, iter(script), []
        self.frame: Frame | None = None
        self.model = _Speaking(adapter.model, self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.adapter, name)

    def prompt(self, *args: Any) -> Any:
        made = self.adapter.prompt(*args)
        self.frame = made.frames[-1]
        return made

    def next_ids(self) -> list[int]:
        self.said.append(self.adapter.render(next(self.script), self.frame))
        ids = self.adapter.tokenizer(self.said[-1], add_special_tokens=False)["input_ids"]
        return [*ids, self.adapter.model.generation_config.eos_token_id]


class _Speaking:
    """A model whose `generate` is led by a script."""

    def __init__(self, model: PreTrainedModel, scripted: Scripted) -> None:
        self._model, self._scripted = model, scripted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, logits_processor: LogitsProcessorList, **kwargs: Any) -> torch.Tensor:
        forced = LogitsProcessorList([*logits_processor, _Forced(self._scripted.next_ids())])
        return self._model.generate(logits_processor=forced, **kwargs)
