"""A cursor over calls like `click(start_box='(1,2)')`, the way UI-TARS writes them: names, quoted values, points.

No Python syntax beyond that is known here. Every pattern runs forward only (possessive quantifiers), so the time of a
scan is linear in the length of the reply.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from agentkv.grammars.base import Reject

MAX_ARGUMENTS = 4
_SPACES = re.compile(r"\s*+")
_NAME = re.compile(r"[A-Za-z0-9_]*+")
# what may follow a call on its line: blanks, or the next token of a chat template
LINE_ENDS = r"\)[ \t]{0,64}(?:$|[\r\n<;])"


def _string_pattern(quote: str, closing: str) -> re.Pattern[str]:
    """The inside of a string: everything up to a quote that `closing` follows."""
    return re.compile(rf"(?:[^{quote}\\]++|\\.|\\|{quote}(?!\s*+(?:{closing})))*+", re.DOTALL)


# A quote inside a value that does not close it is text: models forget to escape. One that ends the call closes, and
# where the call has several arguments so does one in front of `, key=`.
_ANY = {quote: _string_pattern(quote, LINE_ENDS + r"|,\s*+[A-Za-z0-9_]++\s*+=") for quote in "'\""}
_LAST = {quote: _string_pattern(quote, LINE_ENDS) for quote in "'\""}


class Scanner:
    """A cursor at `at` in `text`; every method moves it forward."""

    def __init__(self, text: str, at: int) -> None:
        self.text, self.at = text, at

    def _take(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.text, self.at)
        assert found  # every pattern here matches the empty string too
        self.at = found.end()
        return found[0]

    def peek(self) -> str:
        """The next character, not taken; "" at the end."""
        return self.text[self.at : self.at + 1]

    def spaces(self) -> str:
        """Take the white space that comes next, and return it."""
        return self._take(_SPACES)

    def name(self) -> str:
        """Take the identifier that comes next, "" if there is none."""
        return self._take(_NAME)

    def expect(self, char: str) -> None:
        """Take white space and then `char`; raises `Reject` if something else stands there."""
        self.spaces()
        if self.peek() != char:
            found = repr(self.peek()) if self.peek() else "the end of the reply"
            raise Reject(f"expected {char!r}, found {found}", self.at)
        self.at += 1

    def string(self, last: bool) -> tuple[str, int]:
        """A quoted value and where it starts; `last`: nothing but the end of the call may follow it."""
        self.spaces()
        quote, start = self.peek(), self.at
        if quote not in ("'", '"'):
            raise Reject("expected a quoted value", start)
        self.at += 1
        inside = self._take((_LAST if last else _ANY)[quote])
        if self.peek() != quote:
            raise Reject("the quoted value does not end", start)
        self.at += 1
        return unescape(inside), start

    def arguments(self, single: bool) -> dict[str, tuple[str, int]]:
        """`(key='value', ...)` as key -> (value, position); `single`: the call has one argument, of free text."""
        self.expect("(")
        found: dict[str, tuple[str, int]] = {}
        self.spaces()
        while self.peek() != ")":
            if found:
                self.expect(",")
                self.spaces()
            begin, key = self.at, self.name()
            if not key or key in found:
                raise Reject(
                    f"argument {key[:40]!r} is given twice" if key else "expected an argument `key='...'`", begin
                )
            if len(found) == MAX_ARGUMENTS:
                raise Reject(f"the call has more than {MAX_ARGUMENTS} arguments", begin)
            self.expect("=")
            found[key] = self.string(single)
            self.spaces()
        self.at += 1
        return found


def unescape(text: str) -> str:
    r"""`\n`, `\t`, `\'`, `\"` and `\\` decoded; any other backslash is itself."""
    parts = text.split("\\\\")
    for escape, char in (("\\n", "\n"), ("\\t", "\t"), ("\\'", "'"), ('\\"', '"')):
        parts = [part.replace(escape, char) for part in parts]
    return "\\".join(parts)


def escape(text: str) -> str:
    """Undone by `unescape`; safe between single quotes."""
    for char, escaped in (("\\", "\\\\"), ("\n", "\\n"), ("\t", "\\t"), ("'", "\\'")):
        text = text.replace(char, escaped)
    return text


_NUMBER = re.compile(r"[+-]?[0-9]{1,9}(?:\.[0-9]{1,9})?")
_WRAPPERS = (("<|box_start|>", "<|box_end|>"), ("<point>", "</point>"), ("<bbox>", "</bbox>"), ("(", ")"), ("[", "]"))


def point_of(text: str, position: int) -> tuple[float, float]:
    """`(x,y)` and its other spellings -> (x, y); four numbers are a box and give its centre."""
    inner = text.strip() if len(text) <= 120 else ""
    for opening, closing in _WRAPPERS:
        if inner.startswith(opening) and inner.endswith(closing) and len(inner) >= len(opening) + len(closing):
            inner = inner[len(opening) : len(inner) - len(closing)].strip()
    pieces = inner.replace(",", " ").split()
    if len(pieces) not in (2, 4) or not all(_NUMBER.fullmatch(piece) for piece in pieces):
        raise Reject(f"{text[:40]!r} is not a point; write (x,y)", position)
    numbers = [float(piece) for piece in pieces]
    if len(numbers) == 4:
        return (numbers[0] + numbers[2]) / 2, (numbers[1] + numbers[3]) / 2
    return numbers[0], numbers[1]


@dataclass(frozen=True)
class Call:
    """A scanned call: its name, where it is, its arguments as key -> (text, position)."""

    name: str
    at: int
    arguments: dict[str, tuple[str, int]]

    def only(self, *keys: str) -> None:
        """Rejects arguments that the call does not have."""
        for key, (_, position) in self.arguments.items():
            if key not in keys:
                allowed = ", ".join(keys) or "no arguments"
                raise Reject(f"{self.name} has no argument {key[:40]!r}; it takes {allowed}", position)

    def text(self, key: str, default: str | None = None) -> tuple[str, int]:
        """The value of `key` and its position."""
        if key in self.arguments:
            return self.arguments[key]
        if default is None:
            raise Reject(f"{self.name} needs {key}", self.at)
        return default, self.at
