"""A conversation: one cache over several turns, for text and vision-language models.

Vision-language models of the Qwen family keep the last prompt's rotary offset on the MODEL, so two conversations that
take turns would silently use each other's. And a later turn with a new image needs the new pixels with the positions of
the whole dialogue. Both are handled here: positions are always explicit, and only unseen images are sent.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from textkv.budgets import Budget
from textkv.cache import MethodCache
from textkv.evidence import Spans
from textkv.method import Method


class Conversation:
    """Turns that share one cache.

    Args:
        model: a text model, or a vision-language model with `get_rope_index` (the Qwen-VL families).
        method, budget: as for `MethodCache`.
    """

    def __init__(
        self, model: PreTrainedModel, method: str | Method = "full", budget: Budget | float | str | None = None
    ) -> None:
        self.model = model
        self.cache = MethodCache(model, method, budget)
        self._images = 0

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        spans: Spans | None = None,
        **options,
    ) -> torch.Tensor:
        """Continues the conversation; every argument describes the WHOLE dialogue so far, as a processor gives it.

        Args:
            input_ids: int64 [batch, tokens].
            pixel_values: [patches of all images, features].
            image_grid_thw: int64 [images, 3], all images, oldest first.
            mm_token_type_ids: int64 [batch, tokens], 1 at image tokens.
            spans: columns of every screenshot per row, for methods that ask for them.
            options: for `model.generate`.

        Returns:
            int64 [batch, tokens + generated].

        Raises:
            ValueError: images without their grid or token types, or a dialogue shorter than what was seen.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if hasattr(self.model, "model") and hasattr(self.model.model, "get_rope_index"):
            inputs |= self._visual(input_ids, attention_mask, pixel_values, image_grid_thw, mm_token_type_ids)
        elif pixel_values is not None:
            raise ValueError(f"{type(self.model).__name__} takes no images here")
        self.cache.begin(input_ids, spans=spans, attention_mask=attention_mask)
        return self.model.generate(**inputs, past_key_values=self.cache, **options)

    def _visual(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        grids: torch.Tensor | None,
        kinds: torch.Tensor | None,
    ) -> dict:
        if pixel_values is not None and (grids is None or kinds is None):
            raise ValueError("images need image_grid_thw and mm_token_type_ids, as the processor gives them")
        kinds = torch.zeros_like(input_ids) if kinds is None else kinds
        rope, delta = self.model.model.get_rope_index(
            input_ids, image_grid_thw=grids, mm_token_type_ids=kinds, attention_mask=attention_mask
        )
        self.model.model.rope_deltas = delta
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        text = (real.long().cumsum(1) - 1).clamp(min=0)
        inputs = {"position_ids": torch.cat([text[None], rope.to(text)]), "mm_token_type_ids": kinds}
        if grids is not None and len(grids) > self._images:
            patches = grids.prod(1)
            start = int(patches[: self._images].sum())
            inputs |= {"pixel_values": pixel_values[start:], "image_grid_thw": grids[self._images :]}
            self._images = len(grids)
        return inputs
