"""A cursor over calls like `click(start_box='(1,2)')`, the way UI-TARS writes them: names, quoted values, points.

No Python syntax beyond that is known here. Every pattern runs forward only (possessive quantifiers), so the time of a
scan is linear in the length of the reply.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from agentkv.grammars.base import Reject

MAX_ARGUMENTS = 12
_SPACES = re.compile(r"\s*+")
_NAME = re.compile(r"[A-Za-z0-9_]*+")
# a number, a word, or a point without its quotes
_BARE = re.compile(r"[(\[][0-9., \t+-]{1,80}[)\]]|[A-Za-z0-9_.+-]{1,80}|")
# what may follow a call on its line: blanks, or the next token of a chat template
LINE_ENDS = r"[)）][ \t]{0,64}(?:$|[\r\n<;`])"
_NEXT = r"[,，]\s*+[A-Za-z0-9_]{1,40}+\s*+=\s*+(?:['\"0-9(\[]|(?:[Tt]rue|[Ff]alse|None|null)\b)"
# Arguments that calls have: behind one of these a text is over, whatever quotes it holds.
KNOWN = (
    "content|start_box|end_box|start_point|end_point|point|direction|key|keys|hotkey|app_name|amount|time|seconds|url"
)
_KNOWN_NEXT = rf"[,，]\s*+(?:{KNOWN})\s*+=\s*+['\"0-9(\[]"


def _until(quote: str, closing: str) -> re.Pattern[str]:
    """The inside of a string: everything up to a quote that `closing` follows."""
    return re.compile(rf"(?:[^{quote}\\]++|\\.|\\|{quote}(?!\s*+(?:{closing})))*+", re.DOTALL)


def _plain(quote: str) -> re.Pattern[str]:
    """A string without a quote in it, behind which the next argument stands."""
    return re.compile(rf"((?:[^{quote}\\]++|\\.)*+){quote}(?=\s*+{_NEXT})", re.DOTALL)


# the bracket of another call with its first argument, and such a call on the same line
BRACKET = rf"(?<=[a-z_])\((?:{KNOWN})="
ANOTHER = rf"[^'\"\r\n(]{{0,60}}+{BRACKET}"
# A quote inside a value that does not close it is text: models forget to escape.
_CLOSING = {quote: _until(quote, rf"{LINE_ENDS}|{_KNOWN_NEXT}|[)）]{ANOTHER}") for quote in "'\""}
_PLAIN = {quote: _plain(quote) for quote in "'\""}
# a text that ends in a backslash: the quote before the bracket closes it all the same
_BACKSLASH = {quote: re.compile(rf"([^{quote}\r\n]*+){quote}(?=\s*+{LINE_ENDS})") for quote in "'\""}
_CALL_END = {quote: re.compile(quote + r"\s*+" + LINE_ENDS) for quote in "'\""}
# a value between the quotes of a printed page, with none of these in it
_CURLY = re.compile(r"(?:‘([^‘’“”\r\n]{0,2000}+)’|“([^‘’“”\r\n]{0,2000}+)”)(?=\s*+[,，)）])")
# arguments whose end nobody can guess: of a reply that ends in one, nothing is typed
TEXTS = ("content", "app_name", "url")
_SHORT = {quote: re.compile(rf"{quote}([^{quote}\\\r\n]{{0,200}}+){quote}(?=\s*+\Z)") for quote in "'\""}
_BEFORE_BRACKET = {quote: re.compile(rf"{quote}[ \t]{{0,64}}[)）]") for quote in "'\""}


class Scanner:
    """A cursor at `at` in `text`; every method moves it forward."""

    def __init__(self, text: str, at: int, calls: Iterable[str] = ()) -> None:
        self.text, self.at = text, at
        # a line that may stand below a call: empty, the next call, the next thought, a token of a chat template
        marks = "|".join([*(rf"{name}\(" for name in calls), "Action", "Thought", "Reflection", "<", "```"])
        self._below = re.compile(
            rf"\s*+[)）][ \t]*+\r?\n[ \t]*+(?:\r?\n|\Z|{marks})|\s*+[)）][ \t]*+(?:\Z|[<;`]|{ANOTHER})|\s*+[,，]"
        )

    def _take(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.text, self.at)
        assert found  # every pattern here matches the empty string too
        self.at = found.end()
        return found[0]

    def peek(self) -> str:
        """The next character, not taken; "" at the end."""
        return self.text[self.at : self.at + 1].translate(WIDE)

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

    def value(self, key: str = "content") -> tuple[str, int]:
        """A quoted value, or a number, word or point without quotes, and where it starts. Of the argument `key`: only
        what is no text may stand at the end of a reply that lacks its last bracket.
        """
        self.spaces()
        quote, start = self.peek(), self.at
        if quote in ("'", '"'):
            short = None if key in TEXTS else _SHORT[quote].match(self.text, start)
            self.at = short.end() if short else start
            return (unescape(short[1]) if short else self.string(quote)), start
        curly = _CURLY.match(self.text, start)
        if curly:
            self.at = curly.end()
            return unescape(curly[1] or curly[2] or ""), start
        bare = self._take(_BARE)
        if not bare:
            raise Reject("expected a quoted value", start)
        return bare, start

    def string(self, quote: str) -> str:
        """A quoted value: up to the next argument if no quote stands before that, else up to the quote that ends the
        call or stands before an argument that calls have.
        """
        start = self.at
        self.at += 1
        plain = _PLAIN[quote].match(self.text, self.at)
        inside = plain[1] if plain else self._take(_CLOSING[quote])
        if plain:
            self.at += len(plain[1])
        if self.peek() != quote:
            self.at = start + 1
            inside = self._forgiven(quote, start)
        elif not self._below.match(self.text, self.at + 1) and _CALL_END[quote].search(self.text, self.at + 1):
            raise Reject("the quoted value may end on this line or on a later one", start)
        self.at += 1
        return unescape(inside)

    def _forgiven(self, quote: str, start: int) -> str:
        """A string whose end no rule found: a backslash stands before the last quote, or prose follows the call."""
        backslash = _BACKSLASH[quote].match(self.text, self.at)
        if backslash:
            self.at += len(backslash[1])
            return backslash[1]
        line = self.text.find("\n", self.at)
        line = len(self.text) if line < 0 else line
        ends = [found.start() for found in _BEFORE_BRACKET[quote].finditer(self.text, self.at, line)]
        if len(ends) != 1:  # with several, which one the model meant would be a guess
            raise Reject("the quoted value does not end", start)
        inside, self.at = self.text[self.at : ends[0]], ends[0]
        return inside

    def arguments(self) -> dict[str, tuple[str, int]]:
        """`(key='value', ...)` as key -> (value, position)."""
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
            found[key] = self.value(key)
            self.spaces()
            if self.at == len(self.text) and key not in TEXTS:
                return found
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
_WRAPPERS = (
    ("<|box_start|>", "<|box_end|>"),
    ("<point>", "</point>"),
    ("<bbox>", "</bbox>"),
    *(("(", ")"), ("[", "]")) * 2,
)
# what stands between the two corners of a box: `(1,2),(3,4)`
_CORNERS = re.compile(r"[)\]]\s*,?\s*[(\[]")
# marks as a Chinese keyboard writes them
WIDE = str.maketrans("，（）：", ",():")


def point_of(text: str, position: int) -> tuple[float, float]:
    """`(x,y)` and its other spellings -> (x, y); four numbers are a box and give its centre."""
    inner = text.translate(WIDE).strip() if len(text) <= 120 else ""
    for opening, closing in _WRAPPERS:
        if inner.startswith(opening) and inner.endswith(closing) and len(inner) >= len(opening) + len(closing):
            inner = inner[len(opening) : len(inner) - len(closing)].strip()
    pieces = _CORNERS.sub(" ", inner, count=1).replace(",", " ").split()
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

    def first(self, *keys: str) -> str | None:
        """The name under which an argument with several names is given, None if it is not."""
        return next((key for key in keys if key in self.arguments), None)

    def text(self, key: str, default: str | None = None) -> tuple[str, int]:
        """The value of `key` and its position."""
        if key in self.arguments:
            return self.arguments[key]
        if default is None:
            raise Reject(f"{self.name} needs {key}", self.at)
        return default, self.at
