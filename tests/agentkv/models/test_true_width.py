"""One agent step per family at the true width of its published model, cut to two layers, on 1280x720 screenshots.

Weights are random, the vocabulary is small. Prompts and spans are checked at the full resolution of the checkpoint's
own image settings; the network then reads smaller screenshots, so that a step takes seconds. With FULL_SCREENS=1 in the
environment it reads the full ones too (minutes per step on a CPU).
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from PIL import Image
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
)
from transformers.initialization import no_init_weights

from agentkv.agent import Agent
from agentkv.envs.actions import Click
from agentkv.grammars import CoordinateSpace, Frame, ParseError
from agentkv.models.chat import ChatAdapter
from agentkv.models.evocua import EvoCuaAdapter, EvoCuaS1Adapter
from agentkv.models.fara import FaraAdapter
from agentkv.models.gui_owl import GuiOwlAdapter
from agentkv.models.holo import Holo2Adapter, HoloAdapter
from agentkv.models.mai_ui import MaiUiAdapter
from agentkv.models.opencua import OpenCuaAdapter
from agentkv.models.opencua_model import OpenCuaConfig
from agentkv.models.qwen3_5 import Qwen35Adapter
from agentkv.models.qwen3_vl import Qwen3VLAdapter
from agentkv.models.qwen_vl import QwenVLAdapter
from agentkv.models.ui_tars import UiTarsAdapter
from tests.agentkv.models import opencua_checkpoint
from tests.agentkv.models.build import (
    fill,
    opencua_tokenizer,
    processor,
    qwen_tokenizer,
    screenshot,
    vocabulary,
)

GOAL = "Put button number 3 into the basket."
VIEWPORT = (1280, 720)


def qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    ids = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": 0,
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }


def qwen2_5_vl(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """Qwen2.5-VL-7B and UI-TARS-1.5-7B."""
    text = {
        "vocab_size": vocabulary(tokenizer), "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 2,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        "fullatt_block_indexes": [1], "window_size": 112,
    }  # fmt: skip
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **qwen_ids(tokenizer))


def qwen3_vl(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """Qwen3-VL-4B."""
    text = {
        "vocab_size": vocabulary(tokenizer), "hidden_size": 2560, "intermediate_size": 9728, "head_dim": 128,
        "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 262144,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                            "mrope_interleaved": True},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560,
        "num_position_embeddings": 2304, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    return Qwen3VLConfig(text_config=text, vision_config=vision, **qwen_ids(tokenizer))


def opencua_7b(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    return OpenCuaConfig(**opencua_checkpoint.config(opencua_checkpoint.Shape.true_width(), tokenizer))


def qwen3_5(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """Qwen3.5-9B, as transformers' own defaults have it: one linear layer and one with full attention."""
    text = {"vocab_size": vocabulary(tokenizer), "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": None,
            "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
    vision = {"depth": 2}
    made = Qwen3_5Config(text_config=text, vision_config=vision, **qwen_ids(tokenizer))
    made.vision_config.out_hidden_size = made.text_config.hidden_size
    return made


@dataclass(frozen=True)
class Family:
    """One adapter, its sizes, and what 1280x720 becomes: at the checkpoint's own pixel limits, and at small ones."""

    adapter: type[ChatAdapter]
    config: Callable[[PreTrainedTokenizerFast], PreTrainedConfig]
    pixels: tuple[int, int]
    resized: tuple[int, int]
    few_pixels: tuple[int, int]
    few_resized: tuple[int, int]


FEW = (28 * 28 * 4, 28 * 28 * 30)
TWO_AND_A_HALF = (qwen2_5_vl, (3136, 12845056), (1288, 728), FEW, (196, 112))
THREE = (qwen3_vl, (65536, 16777216), (1280, 704), (1024, 1024 * 30), (224, 128))
# by network, so that each is made once
FAMILIES = {
    "ui-tars": Family(UiTarsAdapter, qwen2_5_vl, (100 * 784, 16384 * 784), (1288, 728), FEW, (196, 112)),
    "qwen2.5-vl": Family(QwenVLAdapter, *TWO_AND_A_HALF),
    "fara": Family(FaraAdapter, *TWO_AND_A_HALF),
    "holo": Family(HoloAdapter, *TWO_AND_A_HALF),
    "qwen3-vl": Family(Qwen3VLAdapter, *THREE),
    "gui-owl": Family(GuiOwlAdapter, *THREE),
    "evocua": Family(EvoCuaAdapter, *THREE),
    "evocua-s1": Family(EvoCuaS1Adapter, *THREE),
    "mai-ui": Family(MaiUiAdapter, *THREE),
    "holo2": Family(Holo2Adapter, *THREE),
    "qwen3.5": Family(Qwen35Adapter, qwen3_5, *THREE[1:]),
    "opencua": Family(OpenCuaAdapter, opencua_7b, (3136, 12845056), (1288, 728), FEW, (196, 112)),
}


@dataclass(frozen=True)
class Bench:
    """A family and its network."""

    family: Family
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    def adapter(self, pixels: tuple[int, int]) -> ChatAdapter:
        patch = self.model.config.vision_config.patch_size
        return self.family.adapter(self.model, self.tokenizer, processor(patch, pixels))


class Made:
    """The network that was made last: families of one architecture share it, and one at a time is in memory."""

    config: object = None
    parts: tuple[PreTrainedModel, PreTrainedTokenizerFast] | None = None

    @classmethod
    def of(cls, family: Family) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        if cls.config is not family.config:
            cls.parts = None
            gc.collect()
            texts = [text for f in FAMILIES.values() for text in (f.adapter.words.system, f.adapter.words.prompt)]
            tokenizer = (opencua_tokenizer if family.adapter is OpenCuaAdapter else qwen_tokenizer)(*texts)
            with no_init_weights():
                model = family.adapter.architecture._from_config(
                    family.config(tokenizer), dtype=torch.float32
                )  # faster than bf16 on a CPU
            cls.config, cls.parts = family.config, (fill(model), tokenizer)
        assert cls.parts is not None
        return cls.parts


@pytest.fixture(scope="module", params=list(FAMILIES))
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    family = FAMILIES[request.param]
    yield Bench(family, *Made.of(family))
    if request.param == list(FAMILIES)[-1]:
        Made.config = Made.parts = None
        gc.collect()


def past(adapter: ChatAdapter) -> list[tuple[Image.Image | None, str]]:
    """Five steps with their screenshots."""
    frame = Frame(VIEWPORT, (1280, 720), space=adapter.space)
    return [(screenshot(step), adapter.render(Click(200, 120 + 100 * step), frame)) for step in range(5)]


def test_spans_cover_the_placeholders_of_six_full_screenshots(bench: Bench) -> None:
    adapter = bench.adapter(bench.family.pixels)
    prompt = adapter.prompt(GOAL, past(adapter), screenshot(5), VIEWPORT)
    width, height = bench.family.resized
    unit = adapter.processor.patch_size * adapter.processor.merge_size
    ids = prompt.inputs["input_ids"][0]
    covered = torch.zeros_like(ids, dtype=torch.bool)
    assert len(prompt.spans) == len(prompt.frames) == 6
    for (start, end), frame in zip(prompt.spans, prompt.frames, strict=True):
        covered[start:end] = True
        assert end - start == width * height // unit**2 <= 1200
        assert (frame.css, frame.resized) == (VIEWPORT, (width, height))
        assert frame.grid == (height // unit, width // unit)
        assert frame.space is adapter.space
    assert torch.equal(covered, ids == adapter.model.config.image_token_id)
    assert torch.equal(covered.int(), prompt.inputs["mm_token_type_ids"][0])
    assert len(prompt.inputs["pixel_values"]) == 4 * int(covered.sum())


def test_points_come_back(bench: Bench) -> None:
    adapter = bench.adapter(bench.family.pixels)
    frame = adapter.prompt(GOAL, [], screenshot(), VIEWPORT).frames[0]
    said = adapter.render(Click(320, 360), frame)
    found = adapter.parse(said, frame)
    assert isinstance(found, Click) and (found.x, found.y) == pytest.approx((320, 360), abs=1)
    expected = (322, 364) if adapter.space is CoordinateSpace.RESIZED else (250, 500)
    assert all(str(number) in said for number in expected)
    assert isinstance(adapter.parse("I do not know.", frame), ParseError)


@pytest.mark.parametrize(("method", "budget"), [("full", 1.0), ("gui-kv", 0.2)])
def test_one_agent_step(bench: Bench, method: str, budget: float) -> None:
    family, full = bench.family, "FULL_SCREENS" in os.environ
    adapter = bench.adapter(family.pixels if full else family.few_pixels)
    decision = Agent(adapter, method, budget, max_new_tokens=4).decide(GOAL, past(adapter), screenshot(5), VIEWPORT)
    width, height = family.resized if full else family.few_resized
    unit = adapter.processor.patch_size * adapter.processor.merge_size
    assert [end - start for start, end in decision.spans] == [width * height // unit**2] * 6
    assert [frame.share.shape for frame in decision.frames] == [(height // unit, width // unit)] * 6
    assert 1 <= decision.decode_tokens <= 4
    config = adapter.model.config.text_config
    kinds = getattr(config, "layer_types", None) or []
    layers = config.num_hidden_layers - kinds.count("linear_attention")  # those have no KV cache
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * layers * config.num_key_value_heads * size * adapter.model.dtype.itemsize
    states = decision.kv_bytes_full - decision.prompt_tokens * per_token
    assert states > 0 if "linear_attention" in kinds else states == 0
    assert decision.tokens_stored == int(budget * decision.prompt_tokens)
    assert decision.kv_bytes - states < 1.1 * budget * decision.prompt_tokens * per_token
