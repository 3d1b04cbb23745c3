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

import torch
from transformers import PreTrainedTokenizerBase

from textkv.reuse.pictures import Picture
from textkv.reuse.spans import Span

_PLACEHOLDER = re.compile(r"\{([a-z][a-z0-9_]*)\}")

Ids = tuple[int, ...]
Key = tuple[int | str, ...]


@dataclass(frozen=True, eq=False)
class Segment:
    """A text, or a picture, that several prompts share.

    Attributes:
        ids: its tokens.
        base: their keys and values as they were read first, wherever that was; None = not read yet.
        picture: what the tokens show; None = a text.
    """

    ids: Ids
    base: Span | None = None
    picture: Picture | None = None

    @property
    def key(self) -> Key:
        """What tells it from others. Pictures of one size have the same tokens, but not the same pixels."""
        return self.ids if self.picture is None else (*self.ids, self.picture.digest)


@dataclass(frozen=True)
class Part:
    """A piece of a prompt.

    Attributes:
        name: of the placeholder that it fills; None = a fixed piece.
        number: of the placeholder, or of the fixed piece, in its template.
        ids: its tokens; may be empty.
        start: number of its first token in the prompt.
        place: rotary position of that token: its number, but behind pictures, which take fewer positions than tokens.
        picture: what the tokens show; None = text.
    """

    name: str | None
    number: int
    ids: Ids
    start: int
    place: int
    picture: Picture | None = None

    @property
    def stop(self) -> int:
        """Number of the token behind its last."""
        return self.start + len(self.ids)

    @property
    def behind(self) -> int:
        """Rotary position of the token behind its last."""
        return self.place + (len(self.ids) if self.picture is None else self.picture.extent)

    @property
    def segment(self) -> Segment:
        """The part as it may stand in other prompts, without KV."""
        return Segment(self.ids, picture=self.picture)


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

    def parts(self, given: Mapping[str, Ids | Segment]) -> tuple[Part, ...]:
        """The prompt's parts p0, ph1, p1, .., pI with the tokens of what was given.

        Args:
            given: for each placeholder the tokens of a text, or a segment.

        Raises:
            ValueError: a placeholder without a text, or a text without a placeholder.
        """
        wrong = sorted(set(self.names) ^ set(given))
        if wrong:
            what = "got no text" if wrong[0] in self.names else "is not in the template"
            raise ValueError(f"placeholder {{{wrong[0]}}} {what}; this template has {', '.join(self.names) or 'none'}")
        told = {name: x if isinstance(x, Segment) else Segment(tuple(x)) for name, x in given.items()}
        fixed = [(None, number, Segment(ids)) for number, ids in enumerate(self.pieces)]
        filled = [(name, number, told[name]) for number, name in enumerate(self.names)]
        order = [fixed[0], *chain.from_iterable(zip(filled, fixed[1:], strict=True))]
        parts: list[Part] = []
        for name, number, segment in order:
            start, place = (parts[-1].stop, parts[-1].behind) if parts else (0, 0)
            parts.append(Part(name, number, segment.ids, start, place, segment.picture))
        return tuple(parts)


def ids_of(parts: tuple[Part, ...]) -> list[int]:
    """All tokens of a prompt."""
    return [token for part in parts for token in part.ids]


def marks_of(parts: tuple[Part, ...]) -> list[int | tuple[int, str]]:
    """What tells a prompt's tokens from another's: a token of a picture goes with its picture."""
    return [mark for x in parts for mark in (x.ids if x.picture is None else [(i, x.picture.digest) for i in x.ids])]


def places_of(parts: tuple[Part, ...]) -> torch.Tensor:
    """Rotary positions of a prompt's tokens, int64 [3, tokens]: alike on all axes, but within pictures."""
    return torch.cat(
        [x.place + (torch.arange(len(x.ids)).expand(3, -1) if x.picture is None else x.picture.offsets) for x in parts],
        1,
    )


def outside_pictures(parts: tuple[Part, ...], token: int) -> int:
    """The last token, not after `token`, at which a prompt may be cut: a model reads a picture as one piece."""
    return next((x.start for x in parts if x.picture is not None and x.start < token < x.stop), token)
