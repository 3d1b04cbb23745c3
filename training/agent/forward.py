"""The training forward pass: the same weights and the same result as the model's own forward, batched.

The model's own vision tower attends to one image after another; in training all screenshots have one size, so they go
through as one batch. Only positions with a label reach the vocabulary projection. A test holds both paths equal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from training.agent.packing import IGNORE, Batch
from training.agent.shape import RESIZED

_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def patches(images: torch.Tensor, patch: int, merge: int) -> torch.Tensor:
    """Screenshots uint8 [N, height, width, 3], enlarged as the processor does -> normalised patches [N, tokens, 3 *
    patch * patch], merge blocks together.
    """
    (width, height), count, side = RESIZED, len(images), patch * merge
    pixels = images.permute(0, 3, 1, 2).float()
    # Columns first, then rows, rounded after each, as Pillow does.
    for size in ((pixels.shape[2], width), (height, width)):
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    pixels = (pixels / 255.0 - _MEAN.to(pixels.device)) / _STD.to(pixels.device)
    grid = pixels.view(count, 3, height // side, merge, patch, width // side, merge, patch)
    return grid.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(count, -1, 3 * patch * patch)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [.., head_dim] turned by the rotary angles in `cos` and `sin`, pairs half a head apart."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def _angles(visual: torch.nn.Module, rows: int, columns: int, merge: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [tokens, head_dim] of one frame's patches in merge-block order."""
    index = (
        torch.arange(rows * columns).view(rows // merge, merge, columns // merge, merge).permute(0, 2, 1, 3).flatten()
    )
    frequency = visual.rotary_pos_emb.inv_freq.float()
    place = torch.stack([index // columns, index % columns]).to(frequency.device)
    angle = place[..., None].float() * frequency
    both = torch.cat([angle[0], angle[1]], dim=-1)
    both = torch.cat([both, both], dim=-1)
    return both.cos(), both.sin()


def encode_images(model: Qwen2_5_VLForConditionalGeneration, images: torch.Tensor) -> torch.Tensor:
    """Screenshots uint8 [N, height, width, 3] -> visual tokens [N, tokens, hidden]."""
    visual, config = model.model.visual, model.config.vision_config
    flat = patches(images, config.patch_size, config.spatial_merge_size)
    rows, columns = RESIZED[1] // config.patch_size, RESIZED[0] // config.patch_size
    # A still image is repeated along time, so the temporal slices of the kernel may be summed first.
    weight = visual.patch_embed.proj.weight.sum(2).flatten(1)
    hidden = F.linear(flat, weight).to(weight.dtype)
    cos, sin = _angles(visual, rows, columns, config.spatial_merge_size)
    for block in visual.blocks:
        hidden = _vision_block(block, hidden, cos, sin)
    count, tokens, width = hidden.shape
    return visual.merger(hidden.reshape(count * tokens, width)).view(count, tokens // config.spatial_merge_size**2, -1)


def _vision_block(block: torch.nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    count, tokens, width = hidden.shape
    heads = block.attn.num_heads
    qkv = block.attn.qkv(block.norm1(hidden)).view(count, tokens, 3, heads, width // heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(rotate(query, cos, sin), rotate(key, cos, sin), value)
    hidden = hidden + block.attn.proj(mixed.transpose(1, 2).reshape(count, tokens, width))
    return hidden + block.mlp(block.norm2(hidden))


class Reading(NamedTuple):
    """What the text layers made of a batch: `last` [B, S, hidden] behind the final norm; the input `hidden` [B, S,
    hidden] of the layer that hints look into, that layer, its rotary (cos, sin) [B, S, head_dim] and the additive
    mask [B, 1, S, S].
    """

    last: torch.Tensor
    hidden: torch.Tensor
    layer: torch.nn.Module
    angles: tuple[torch.Tensor, torch.Tensor]
    mask: torch.Tensor


def read(model: Qwen2_5_VLForConditionalGeneration, batch: Batch, hint_layer: int = 2) -> Reading:
    """Run the vision tower and the text layers over `batch`."""
    text = model.model.language_model
    embedded = text.embed_tokens(batch.ids)
    holes = (batch.ids == model.config.image_token_id)[..., None].expand_as(embedded)
    hidden = embedded.masked_scatter(holes, encode_images(model, batch.images).to(embedded.dtype))
    shut, kind = ~batch.visible(), hidden.device.type
    compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    mask = torch.zeros(shut.shape, dtype=compute, device=shut.device).masked_fill_(shut, torch.finfo(compute).min)
    angles = text.rotary_emb(hidden, batch.positions)
    kept = hidden
    for number, layer in enumerate(text.layers):
        if number == hint_layer:
            kept = hidden
        hidden = layer(hidden, attention_mask=mask, position_embeddings=angles)
    sections = model.config.text_config.rope_parameters["mrope_section"]
    return Reading(text.norm(hidden), kept, text.layers[hint_layer], _mixed(angles, sections), mask)


def _mixed(angles: tuple[torch.Tensor, torch.Tensor], sections: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of M-RoPE [3, B, S, head_dim] -> [B, S, head_dim]: each section of frequencies from its own axis."""
    if angles[0].ndim == 3:
        return angles
    cos, sin = (
        torch.cat([part[axis % 3] for axis, part in enumerate(table.split(sections * 2, dim=-1))], dim=-1)
        for table in angles
    )
    return cos, sin


def answer_logits(
    model: Qwen2_5_VLForConditionalGeneration, batch: Batch, reading: Reading
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [labels, vocab] and targets [labels] at every labelled position of `batch`, in row order."""
    chosen = batch.labels != IGNORE
    return model.lm_head(reading.last[chosen]), batch.labels[chosen]
