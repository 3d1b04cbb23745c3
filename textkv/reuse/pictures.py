"""A picture as a piece of a prompt, for models that tell by a token's position where in its picture it lies (M-RoPE).

Such a model gives a token three rotary positions (time, row, column). In a picture they count from where the picture
begins, on all three axes; behind it text goes on from the largest of them. So a picture that comes elsewhere moves by
one number on every axis, as a text is, but it takes fewer positions than it has tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from transformers import PreTrainedModel

from textkv.rotary import axes_of


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture with the marks around it.

    Attributes:
        ids: its tokens: a mark, one for each patch that the model sees, a mark.
        kinds: int64 [tokens], 1 where a patch stands.
        offsets: int64 [3, tokens], rotary positions (time, row, column), counted from the first mark.
        pixels: `pixel_values` [patches, features], as the model's image processor gives them.
        grid: `image_grid_thw` int64 [1, 3].
        digest: of pixels and grid: two pictures of one size have the same tokens.
    """

    ids: tuple[int, ...]
    kinds: torch.Tensor
    offsets: torch.Tensor
    pixels: torch.Tensor
    grid: torch.Tensor
    digest: str

    @property
    def extent(self) -> int:
        """Rotary positions that it takes: text behind it begins so far behind its first mark."""
        return int(self.offsets.max()) + 1

    @property
    def shape(self) -> tuple[int, ...]:
        """(frames, rows, columns): only pictures of one shape have their patches at the same positions."""
        return tuple(self.grid[0].tolist())


def picture(model: PreTrainedModel, image_processor: Any, image: Any) -> Picture:
    """An image as the model reads it.

    Args:
        model: of the Qwen-VL families.
        image_processor: the model's own.
        image: what that takes, e.g. a PIL image in RGB.

    Raises:
        ValueError: a model that reads no pictures, or gives their tokens one position.
    """
    inner, marks = getattr(model, "model", None), ("vision_start_token_id", "image_token_id", "vision_end_token_id")
    found = [getattr(model.config, name, None) for name in marks]
    if axes_of(model) is None or None in found or not hasattr(inner, "get_rope_index"):
        raise ValueError(
            f"{type(model).__name__} is no model of the Qwen-VL families: only these tell where tokens of a picture "
            "lie, so that agents can share it"
        )
    seen = image_processor(images=[image], return_tensors="pt")
    pixels, grid = seen["pixel_values"].to(model.dtype), seen["image_grid_thw"]
    begin, patch, end = found
    count = int(grid[0].prod()) // model.config.vision_config.spatial_merge_size**2
    ids = torch.tensor([[begin, *[patch] * count, end]])
    kinds = (ids == patch).long()
    offsets, _ = inner.get_rope_index(ids, image_grid_thw=grid, mm_token_type_ids=kinds)
    digest = sha256(pixels.float().numpy().tobytes() + str(grid.tolist()).encode()).hexdigest()
    return Picture(tuple(ids[0].tolist()), kinds[0], offsets[:, 0], pixels, grid, digest)
