"""The mini model's own tokenizer: byte-level BPE with Qwen's special tokens, built so that an answer is short.

The opening of every action ("Action: click(start_box='(") and its close are one token each, and a number written inside
a point, "(84,112)", is one token, so a click costs five tokens. Digits anywhere else are single tokens, which keeps
random strings copyable. The learned merges come from the goal texts of the training pages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

ANSWER_PIECES = (
    "Thought: ",
    "Action: click(start_box='(",
    "Action: left_double(start_box='(",
    "Action: right_single(start_box='(",
    "Action: drag(start_box='(",
    "Action: scroll(start_box='(",
    "Action: type(content='",
    "Action: hotkey(key='",
    "Action: wait()",
    "Action: finished(content='",
    "Action: call_user()",
    ")', end_box='(",
    ")', direction='",
    ")')",
    "')",
)

MAX_NUMBER = 255
# Numbers inside a point (next to its comma) stay whole, any other digit stands alone; words carry their leading space.
_SPLIT = r"(?<![0-9])\d{1,3}(?=,[0-9])|(?<=[0-9],)\d{1,3}(?![0-9])|\d| ?\p{L}+|\n| ?[^\s\p{L}\d]|\s"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(texts: Iterable[str], vocab_size: int = 1536) -> PreTrainedTokenizerFast:
    """Train the tokenizer on `texts` (goals, labels, actions); at most `vocab_size` learned tokens, plus numbers and
    specials.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer.from_str(json.dumps(_with_numbers(json.loads(tokenizer.to_str()))))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ANSWER_PIECES])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _with_numbers(state: dict) -> dict:
    """Add the merges that make every number up to MAX_NUMBER one token (they only ever apply inside a point)."""
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    for number in range(10, MAX_NUMBER + 1):
        text = str(number)
        if text not in vocab:
            vocab[text] = len(vocab)
            merges.append([text[:-1], text[-1]])
    return state
