"""OpenCUA's network, native: the vision tower of Qwen2.5-VL in front of a Qwen2 text model with one-dimensional RoPE.

The parts are transformers' own. They are named as in the published checkpoints (`vision_tower.*`,
`language_model.model.*`, `language_model.lm_head.weight`), so weights load key by key and no code of the checkpoint is
needed. Unlike in Qwen2.5-VL, a visual token has the position of its place in the prompt, like any other token.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel


class OpenCuaConfig(PreTrainedConfig):
    """config.json of an OpenCUA checkpoint: a Qwen2.5-VL `vision_config`, a Qwen2 `text_config`, and the id of the
    token that stands for one visual token.
    """

    model_type = "opencua"
    sub_configs = {"vision_config": Qwen2_5_VLVisionConfig, "text_config": Qwen2Config}
    attribute_map = {"image_token_id": "media_placeholder_token_id"}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    media_placeholder_token_id: int = 151664
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs) -> None:
        for name, kind in self.sub_configs.items():
            part = getattr(self, name) or {}
            if isinstance(part, dict):
                # published parts carry the name of the whole family, and M-RoPE sections that this text model ignores
                part = {key: value for key, value in part.items() if key != "model_type"}
                if (part.get("rope_scaling") or {}).get("mrope_section"):
                    del part["rope_scaling"]
                setattr(self, name, kind(**part))
        super().__post_init__(**kwargs)


class OpenCuaForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Vision tower and text model; `generate` and caches work as on any text model of transformers."""

    config_class = OpenCuaConfig
    config: OpenCuaConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2DecoderLayer", "Qwen2_5_VLVisionBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: OpenCuaConfig) -> None:
        super().__init__(config)
        self.vision_tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(config.vision_config)
        self.language_model = Qwen2ForCausalLM._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        """Those of the language model."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Those of the language model."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> torch.nn.Module:
        """The head of the language model."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: torch.nn.Module) -> None:
        """The head of the language model."""
        self.language_model.set_output_embeddings(new_embeddings)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, tokens, vocabulary] and the cache.

        pixel_values [patches, values] and image_grid_thw [images, 3] belong to the placeholders in input_ids
        [batch, tokens], in their order; they come with the forward that reads the placeholders and not again.
        mm_token_type_ids is accepted because every prompt has it; positions here do not depend on it. Raises
        ValueError when placeholders and visual tokens differ in number.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            inputs_embeds = self._with_screenshots(input_ids, inputs_embeds, pixel_values, image_grid_thw)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )

    def _with_screenshots(
        self, input_ids: torch.Tensor | None, embeds: torch.Tensor, pixels: torch.Tensor, grids: torch.Tensor
    ) -> torch.Tensor:
        if input_ids is None:
            raise ValueError("pixel_values need input_ids: their placeholders say where the screenshots belong")
        seen = self.vision_tower(pixels.to(self.vision_tower.dtype), grid_thw=grids).pooler_output
        places = input_ids == self.config.media_placeholder_token_id
        if int(places.sum()) != len(seen):
            raise ValueError(
                f"the prompt has {int(places.sum())} placeholders, the screenshots make {len(seen)} visual tokens; "
                "repeat the placeholder once per visual token"
            )
        return embeds.masked_scatter(places[..., None], seen.to(embeds))
