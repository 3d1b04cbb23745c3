"""Small stand-ins for what a checkpoint brings: tokenizers, image processors, random weights; and screenshots."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
OPENCUA_TOKENS = (
    "[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>",
    "<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|media_placeholder|>", "[PAD]",
)  # fmt: skip
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def small_tokenizer(
    specials: tuple[str, ...], eos: str, pad: str, template: str | None, texts: tuple[str, ...]
) -> PreTrainedTokenizerFast:
    """One token per byte, then what BPE finds in `texts`, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if texts:
        trainer = trainers.BpeTrainer(vocab_size=2048, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=pad, padding_side="left")
    fast.chat_template = template
    return fast


def qwen_tokenizer(*texts: str) -> PreTrainedTokenizerFast:
    return small_tokenizer(QWEN_TOKENS, "<|im_end|>", "<|endoftext|>", CHATML, texts)


def opencua_tokenizer(*texts: str) -> PreTrainedTokenizerFast:
    return small_tokenizer(OPENCUA_TOKENS, "[EOS]", "[PAD]", None, texts)


def vocabulary(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows of an embedding for it."""
    return -(-len(tokenizer) // 32) * 32


def processor_settings(patch: int, pixels: tuple[int, int]) -> dict:
    """preprocessor_config.json as Qwen-VL checkpoints have it; pixels = (least, most) per screenshot."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": patch,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": pixels[0], "longest_edge": pixels[1]},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def processor(patch: int, pixels: tuple[int, int]) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(**{k: v for k, v in processor_settings(patch, pixels).items() if k[-5:] != "_type"})


def screenshot(step: int = 0, width: int = 1280, height: int = 720) -> Image.Image:
    """A page with a bar, a list of buttons and words; `step` moves what is marked."""
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    draw.rectangle((0, 0, width, 56), fill="#20408a")
    draw.text((24, 20), f"Shop - step {step}", fill="white")
    for row in range(6):
        top = 90 + 100 * row
        draw.rectangle((40, top, 360, top + 60), fill="#ffd24d" if row == step % 6 else "#dddddd", outline="black")
        draw.text((60, top + 22), f"Button number {row}", fill="black")
        draw.text((420, top + 22), f"Words about item {row}, which costs {7 * row + step} coins.", fill="#333333")
    return page


def fill(model: PreTrainedModel, scale: float = 0.02, seed: int = 0) -> PreTrainedModel:
    """Random weights, fast: every matrix is cut out of one block of noise, norms stay at one."""
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed)) * scale
    start = 0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "ln_q" in name:
                weight.fill_(1.0)
                continue
            flat, done = weight.view(-1), 0
            while done < len(flat):
                piece = noise[start % 65_536 :][: len(flat) - done]
                flat[done : done + len(piece)] = piece
                done, start = done + len(piece), start + 7_919
    return model.eval()


def write_json(folder: Path, name: str, value: dict) -> None:
    (folder / name).write_text(json.dumps(value))
