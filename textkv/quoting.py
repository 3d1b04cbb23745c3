"""What others say stays what they say: no text can open a turn, end one, or claim a picture by spelling a chat's marks.

A mark is a token of its own (`<|im_end|>`), which a tokenizer finds in any text. Where one stands in somebody's words a
cut is put into it before the template is rendered; the tokenizer is then given the cut as a token, which parts the
mark's letters, and the cut is taken out of the ids: the letters are there, and no mark. Texts without a mark never meet
any of this: their ids are those of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Sequence
from secrets import token_hex
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from tokenizers import AddedToken

UNKNOWN = "\U0010ffff"
CUT = f"cut{token_hex(12)}"  # nobody outside this process knows it
_PARTS = [f"said{token_hex(8)}" for _ in range(4)]
_KNOWN: WeakKeyDictionary[Any, dict[tuple, Quoting]] = WeakKeyDictionary()


class Quoting:
    """The marks of one tokenizer and chat template.

    Args:
        tokenizer: of transformers.
        template: the chat template; None = no chat, the tokenizer's own marks alone.
        marks: contents of added tokens that are marks; None = all that the tokenizer calls special. Those that open and
            end the template's turns are marks in any case.
    """

    def __init__(self, tokenizer: Any, template: str | None, marks: Collection[str] | None = None) -> None:
        added = {token.content: token for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
        special = {content for content, token in added.items() if token.special}
        own = special if marks is None else set(marks)
        turns: set[str] = set()
        plain: list[str] = []
        for glue in _glue(tokenizer, template):
            found = _found(glue, added)
            if not found:
                plain += [glue]
            elif marks is not None or not found & special:
                # A model may open its turns by tokens that it does not call special.
                turns |= found
        self._tokenizer = tokenizer
        # What the model itself has said may hold these: some reason or call between such tokens.
        self._said, self._any = _one_of(own), _one_of(own | turns)
        self._plain = [pattern for pattern in map(_pattern, plain) if pattern is not None]
        ids = getattr(tokenizer, "get_added_vocab", dict)()
        # What stands for letters that a tokenizer does not know is special, and no mark.
        unknown = _flat(tokenizer(UNKNOWN, add_special_tokens=False)["input_ids"]) if ids else ()
        self._ids = {ids[mark]: mark for mark in (own | turns) & ids.keys() if ids[mark] not in unknown}
        self._cutting: tuple[Any, int] | None = None

    @classmethod
    def of(cls, tokenizer: Any, template: str | None, marks: Sequence[str] | None = None) -> Quoting:
        """The same for the same; made once."""
        known = _KNOWN.setdefault(tokenizer, {})
        key = template, marks and tuple(marks), len(getattr(tokenizer, "added_tokens_decoder", ()))
        if key not in known:
            known[key] = cls(tokenizer, template, marks)
        return known[key]

    def quote(self, text: str, said: bool = False) -> str:
        """A text to be put into a template: every mark in it has a cut.

        Args:
            said: by the model itself.

        Raises:
            ValueError: the text writes what opens a turn in this template, and that is no token of its own, so that
                nobody could tell the two apart; or a mark of a single character.
        """
        for pattern in () if said else self._plain:
            if wrong := pattern.search(text):
                raise ValueError(
                    f"a message writes {wrong[0].strip()!r}, with which this model's chat template opens a turn and "
                    "which is no token of its own: leave it out, or write it otherwise"
                )
        return _parted(text, self._said if said else self._any)

    def words(self, text: str) -> list[int]:
        """Token ids of somebody's text by itself, for who puts a prompt together from pieces: no mark is among them.
        Words that open a turn are let through."""
        return self.ids(self.piece(text))

    def piece(self, text: str) -> str:
        """The same, to be put into a template."""
        return _parted(text, self._any)

    def ids(self, text: str) -> list[int]:
        """Token ids of a rendered text, its cuts taken out.

        Raises:
            ValueError: there is a mark among them that was not written as one.
        """
        if CUT in text:
            tokenizer, cut = self._with_cut()
            ids = [i for i in _flat(tokenizer(text, add_special_tokens=False)["input_ids"]) if i != cut]
        else:
            ids = _flat(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        # A tokenizer may bring letters into another form before it looks for marks.
        marks = [i for i in ids if i in self._ids] if self._ids else []
        if marks and len(marks) > len(self._any.findall(text)):
            raise ValueError(
                f"this tokenizer reads a mark of its chat (one of {sorted({self._ids[i] for i in marks})}) where a "
                "message writes other letters: leave them out"
            )
        return ids

    def _with_cut(self) -> tuple[Any, int]:
        """The tokenizer with one token more, and that token's id."""
        if self._cutting is None:
            # A copy: nobody else's ids change. Two threads at once make two, which is as good.
            tokenizer = copy.deepcopy(self._tokenizer)
            tokenizer.add_tokens([AddedToken(CUT, special=True, normalized=False)])
            self._cutting = tokenizer, tokenizer.convert_tokens_to_ids(CUT)
        return self._cutting


def _parted(text: str, marks: re.Pattern | None) -> str:
    while marks is not None and (wrong := marks.search(text)):
        if len(wrong[0]) < 2:
            raise ValueError(f"a message holds {wrong[0]!r}, which is a mark of this model's chat: leave it out")
        # Again, as what is left of one may be another.
        text = marks.sub(lambda found: f"{found[0][0]}{CUT}{found[0][1:]}", text)
    return text


def _flat(ids: Any) -> list[int]:
    ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    return ids[0] if ids and isinstance(ids[0], list) else ids


def _one_of(marks: Collection[str]) -> re.Pattern | None:
    # The longest first, as tokenizers find them.
    longest = sorted((mark for mark in marks if mark), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest))) if longest else None


def _found(text: str, added: Collection[str]) -> set[str]:
    pattern = _one_of(added)
    return set() if pattern is None else set(pattern.findall(text))


def _glue(tokenizer: Any, template: str | None) -> list[str]:
    """What a template writes between a question and its answer, and between that and the next question."""
    if template is None:
        return []
    asked, said, again, rule = _PARTS
    talk = [("user", asked), ("assistant", said), ("user", again)]
    found: list[str] = []
    for turns in (talk, [("system", rule), *talk]):
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
            continue  # some know no system's turn
        # With pictures a template may want lists; what it made of texts is no chat then.
        places = [text.find(content) for _, content in turns]
        if min(places) < 0 or places != sorted(places):
            continue
        ends = [place + len(content) for place, (_, content) in zip(places, turns, strict=True)]
        found += [text[end:place] for end, place in zip(ends, places[1:], strict=False)]
        # What begins a text begins a line.
        found += ["\n" + text[: places[0]]] if turns[0][0] == "system" else []
    return list(dict.fromkeys(found))


def _pattern(glue: str) -> re.Pattern | None:
    """Where a text has the words of a turn's opening, in a line of their own if they are so in the template."""
    words = glue.strip()
    if not re.search(r"\w", words):
        return None
    inner = r"\s+".join(map(re.escape, words.split()))
    before = r"^[ \t]*" if "\n" in glue[: len(glue) - len(glue.lstrip())] else ""
    after = r"[ \t]*$" if "\n" in glue[len(glue.rstrip()) :] else ""
    return re.compile(before + inner + after, re.MULTILINE)
