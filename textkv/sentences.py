"""Where sentences end in a tokenizer's vocabulary.

Tokens are looked at as text, once for a tokenizer: strings looked up as entries would miss those in which a byte-level
vocabulary has merged a full stop with a quote, a bracket or a new line. A mark that the vocabulary splits over several
tokens (bytes of a rare script, two new lines apart) ends no sentence: such a text is cut by length.
"""

from __future__ import annotations

import re
from functools import cache

from transformers import AutoTokenizer

_MARKS = ".!?…‼⁇⁈⁉。．！？｡؟۔।॥։።။។"
"""Of Latin, Chinese and Japanese, Arabic and Urdu, Devanagari, Armenian, Ethiopic, Burmese and Khmer text."""
_END = re.compile(rf"""[{_MARKS}][\s"'”’»)\]}}」』）]*$|\n\s*\n\s*$""")
"""A terminator with nothing but closing quotes, brackets and blanks behind it, or an empty line."""


def ends_sentence(text: str) -> bool:
    """Whether a token of this text ends a sentence. ("3.14" does not; a lone "." always does: what follows is not known
    yet when it comes.)"""
    return _END.search(text) is not None


@cache
def sentence_ends(tokenizer: str) -> tuple[int, ...]:
    """Ids of all tokens that end a sentence, special tokens among them, ascending.

    Args:
        tokenizer: a folder, or a hub id that is on this machine already: nothing is fetched.

    Raises:
        ValueError: no tokenizer can be loaded from there.
    """
    try:
        known = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"no tokenizer in {tokenizer!r} ({type(error).__name__}: {reason})") from None
    texts = known.batch_decode([[number] for number in range(len(known))], clean_up_tokenization_spaces=False)
    special = set(known.all_special_ids)
    return tuple(number for number, text in enumerate(texts) if number in special or ends_sentence(text))
