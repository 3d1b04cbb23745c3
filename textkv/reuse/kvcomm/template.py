"""Prompts with placeholders: fixed pieces of text, and between them what each request fills in.

    PromptTemplate.parse("You are a judge.\n{question}\nAnswer: ", tokenizer)

Pieces and fillings are tokenized one by one, so that a text has the same tokens wherever it stands, and a prompt's
tokens are known piece by piece.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

from transformers import PreTrainedTokenizerBase

from textkv.reuse.spans import Span

_PLACEHOLDER = re.compile(r"\{([a-z][a-z0-9_]*)\}")

Ids = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Segment:
    """A text that several prompts share.

    Attributes:
        ids: its tokens.
        base: their keys and values as they were read first, wherever that was; None = not read yet.
    """

    ids: Ids
    base: Span | None = None


@dataclass(frozen=True)
class Part:
    """A piece of a prompt.

    Attributes:
        name: of the placeholder that it fills; None = a fixed piece.
        number: of the placeholder, or of the fixed piece, in its template.
        ids: its tokens; may be empty.
        start: position of its first token.
    """

    name: str | None
    number: int
    ids: Ids
    start: int

    @property
    def stop(self) -> int:
        """Position behind its last token."""
        return self.start + len(self.ids)


@dataclass(frozen=True)
class PromptTemplate:
    """Fixed pieces p0 .. pI and the names of the placeholders between them.

    Attributes:
        pieces: tokens of the fixed pieces, one more than names; a piece may be empty.
        names: of the placeholders, in order, each once.
    """

    pieces: tuple[Ids, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        twice = next((name for name in self.names if self.names.count(name) > 1), None)
        if twice:
            raise ValueError(f"placeholder {{{twice}}} stands twice in the template; name the second one otherwise")
        if not self.pieces[0]:
            raise ValueError("the template begins with a placeholder; put some fixed text before it, e.g. the role")

    @classmethod
    def parse(cls, text: str, tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
        """Reads "text {name} text": names are lower-case letters, digits and underscores.

        Raises:
            ValueError: a name that stands twice, or no text before the first.
        """
        found = _PLACEHOLDER.split(text)
        pieces = tuple(tuple(tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in found[::2])
        return cls(pieces, tuple(found[1::2]))

    def parts(self, given: Mapping[str, Ids]) -> tuple[Part, ...]:
        """The prompt's parts p0, ph1, p1, .., pI with the tokens of what was given.

        Raises:
            ValueError: a placeholder without a text, or a text without a placeholder.
        """
        wrong = sorted(set(self.names) ^ set(given))
        if wrong:
            what = "got no text" if wrong[0] in self.names else "is not in the template"
            raise ValueError(f"placeholder {{{wrong[0]}}} {what}; this template has {', '.join(self.names) or 'none'}")
        fixed = [(None, number, ids) for number, ids in enumerate(self.pieces)]
        filled = [(name, number, tuple(given[name])) for number, name in enumerate(self.names)]
        order = [fixed[0], *chain.from_iterable(zip(filled, fixed[1:], strict=True))]
        parts, start = [], 0
        for name, number, ids in order:
            parts.append(Part(name, number, ids, start))
            start += len(ids)
        return tuple(parts)


def ids_of(parts: tuple[Part, ...]) -> list[int]:
    """All tokens of a prompt."""
    return [token for part in parts for token in part.ids]
