"""Text in and out of the published models: their tokenizers without remote code, chat templates, end tokens.

LLaDA ships a fast tokenizer that does not declare its mask. Dream ships Qwen2's vocabulary with a Python class whose
only additions are two special tokens. What the folder itself declares (a template, special tokens) goes before ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.utils import cached_file

from dlm.models.decoding_spec import DecodingSpec
from textkv import checkpoints
from textkv.quoting import Quoting

LLADA_CHAT = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
DREAM_CHAT = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """The words of a model family.

    Attributes:
        template: its chat template; None = only the one that the folder declares.
        marks: the special tokens that the template needs; a base model's tokenizer lacks them and gets no template.
        ends: tokens that end an answer, where the vocabulary has them.
        added: special tokens that follow the vocabulary of the files, in the order of their ids.
    """

    template: str | None
    marks: tuple[str, ...]
    ends: tuple[str, ...]
    added: tuple[str, ...] = ()


FAMILIES = {
    "llada": Family(
        LLADA_CHAT,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ("<|endoftext|>", "<|eot_id|>", "<|role_end|>"),
    ),
    "Dream": Family(
        DREAM_CHAT, ("<|im_start|>", "<|im_end|>"), ("<|endoftext|>", "<|im_end|>"), ("<|beginoftext|>", "<|mask|>")
    ),
    "llada2_moe": Family(None, (), ("<|endoftext|>", "<|role_end|>")),
    "sdar": Family(None, (), ("<|endoftext|>", "<|im_end|>")),
    "sdar_moe": Family(None, (), ("<|endoftext|>", "<|im_end|>")),
    "Fast_dLLM_Qwen": Family(None, (), ("<|endoftext|>", "<|im_end|>")),
}


def load_tokenizer(source: str, model_type: str, spec: DecodingSpec) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder or hub id, with its mask, padding and (if it is a chat model's) template declared.

    None if there is neither a tokenizer.json nor the two files of Qwen2's tokenizer. No code of the folder is run.

    Raises:
        ValueError: the mask of the spec is not a token of its own here.
    """
    family = FAMILIES[model_type]
    if _has(source, "tokenizer.json"):
        tokenizer = checkpoints.load_tokenizer(PreTrainedTokenizerFast.from_pretrained, source)
    elif _has(source, "vocab.json") and _has(source, "merges.txt"):
        tokenizer = checkpoints.load_tokenizer(Qwen2Tokenizer.from_pretrained, source)
    else:
        return None
    # Dream's Python class adds two tokens behind the files' vocabulary; without running it they are added here.
    if spec.mask_id >= len(tokenizer) and family.added:
        tokenizer.add_tokens([AddedToken(name, special=True) for name in family.added])
    if spec.mask_id >= len(tokenizer):
        raise ValueError(
            f"the tokenizer at {source} has {len(tokenizer)} tokens, the model's mask is {spec.mask_id}: "
            "they do not belong together; use the tokenizer that came with the model"
        )
    with checkpoints.readable_files(source):  # a config may hold no whole numbers there
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(spec.mask_id)
        if tokenizer.pad_token_id is None and spec.pad_id < len(tokenizer):
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(spec.pad_id)
    # A base model's tokenizer lacks the marks; with the template it would spell them out in letters.
    if (
        tokenizer.chat_template is None
        and family.template is not None
        and set(family.marks) <= set(tokenizer.get_added_vocab())
    ):
        tokenizer.chat_template = family.template
    return tokenizer


def end_ids(tokenizer: PreTrainedTokenizerBase, model_type: str) -> tuple[int, ...]:
    """The ids of the family's end tokens that this tokenizer has as special tokens."""
    # Only added tokens: the same letters in the ordinary vocabulary end nothing.
    special = tokenizer.get_added_vocab()
    return tuple(special[name] for name in FAMILIES[model_type].ends if name in special)


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """The prompt for the next answer to `messages` (each with "role" and "content"), answer header included.

    Earlier answers lose what follows their first end token: they were decoded to a fixed length.

    Raises:
        ValueError: no messages, or a tokenizer without a chat template, as those of base models.
    """
    if not messages:
        raise ValueError("messages is empty; give at least one message with role 'user'")
    if tokenizer.chat_template is None:
        raise ValueError("this tokenizer has no chat template, so its model is no chat model; give it plain text")
    ends = {name for family in FAMILIES.values() for name in family.ends}
    # Names, not ids: the messages are text that earlier answers were decoded to.
    cut = re.compile("|".join(re.escape(name) for name in sorted(ends)))
    messages = [
        {**message, "content": cut.split(message["content"])[0]} if message["role"] == "assistant" else message
        for message in messages
    ]
    quoting = Quoting.of(tokenizer, tokenizer.chat_template)
    told = [{**m, "content": quoting.quote(m["content"], m["role"] == "assistant")} for m in messages]
    return quoting.ids(tokenizer.apply_chat_template(told, add_generation_prompt=True, tokenize=False))


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, bos: bool = False) -> list[int]:
    """The ids of plain text; `bos` puts the begin token in front, as the published evaluations of base models do.

    Raises:
        ValueError: `bos` for a tokenizer that has no begin token.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if bos and tokenizer.bos_token_id is None:
        raise ValueError("bos=True, but this tokenizer has no begin token; use bos=False")
    return [tokenizer.bos_token_id, *ids] if bos else ids


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: tuple[int, ...]) -> str:
    """The text of an answer's ids up to its first end token."""
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return tokenizer.decode(ids[:stop], skip_special_tokens=True)


def _has(source: str, name: str) -> bool:
    try:
        path = cached_file(
            source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
    except (OSError, ValueError):
        return False
    return path is not None
