"""Words in the chat format of a tokenizer."""

from __future__ import annotations

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from textkv.quoting import Quoting


def chat(tokenizer: PreTrainedTokenizerBase, role: str | None, body: str) -> str:
    """A user's turn and the beginning of the answer, behind a system's turn if there is a role; the words themselves
    where the tokenizer has no chat format."""
    if not tokenizer.chat_template:
        return f"{role}\n{body}" if role else body
    how = {"tokenize": False, "add_generation_prompt": True}
    system = [] if role is None else [{"role": "system", "content": role}]
    try:
        return tokenizer.apply_chat_template([*system, {"role": "user", "content": body}], **how)
    except TemplateError:  # a family whose chats have no system's turn
        return tokenizer.apply_chat_template([{"role": "user", "content": f"{role}\n\n{body}"}], **how)


def words(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Tokens of a text from outside: what looks like a special token in it is text, and ends no turn.

    Raises:
        ValueError: it holds half of a pair of code units, which no tokenizer reads.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a character at {error.start} of a text; write the whole one") from None
    return tuple(Quoting.of(tokenizer, tokenizer.chat_template).words(text))


def ends(model, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer."""
    told = model.generation_config.eos_token_id
    return {*(told if isinstance(told, list) else [told]), tokenizer.eos_token_id} - {None}
