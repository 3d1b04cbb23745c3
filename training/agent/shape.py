"""The mini model's size: a real Qwen2.5-VL, only small enough to be trained on two CPU cores and shipped with the code.

Three settings differ in kind from the 7B. `rope_theta` is 30 instead of 1e6: with 16 frequencies per head the width
axis of M-RoPE would otherwise turn by less than 0.001 rad over a whole screenshot. Every vision block sees the whole
frame. Patches are not merged: a small page then still has 192 visual tokens, enough for a cache method to choose from.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig

PATCH = 14
MERGE = 1
# A screenshot of 160 x 210 CSS pixels is enlarged to 168 x 224, which makes 12 x 16 visual tokens. The library rounds
# up after scaling to the fewest pixels, hence a little less than 12 * 16 here.
SCREEN, RESIZED, CELLS = (160, 210), (168, 224), (12, 16)
MIN_PIXELS = 185 * (PATCH * MERGE) ** 2
MAX_PIXELS = 1024 * (PATCH * MERGE) ** 2


def mini_config(tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLConfig:
    """The configuration of the embedded model for `tokenizer`'s vocabulary (about 3 million parameters)."""
    token = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
    }
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 4,
        "out_hidden_size": 192,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": 8 * PATCH,
        "fullatt_block_indexes": [0, 1, 2, 3],
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
