"""Composition strings: "name", "name(arg, key=value)", "a+b(x)". Text in, names and literals out; never evaluated."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from inspect import signature
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
LARGEST = 2**31 - 1  # of an argument: tokens, layers, bits
_WHOLE = re.compile(r"[+-]?[0-9]{1,400}")
_NUMBER = re.compile(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|nan|inf(inity)?)", re.IGNORECASE)
_WORDS = {
    int: "a whole number", float: "a number", bool: "True or False", str: "a text in quotes",
    tuple: "numbers in brackets", NoneType: "None",
}  # fmt: skip


def split_list(text: str) -> list[str]:
    """The parts of a comma-separated list of compositions, names or numbers, each once: commas inside brackets belong
    to a method's arguments."""
    return list(dict.fromkeys(part for part in split_commas(text) if part))


def split_commas(text: str) -> list[str]:
    """As `split_list`, with the parts that are empty, and those that come twice."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text)]


def split_parts(expression: str) -> list[str]:
    """The parts of "a+b(x)", split at each `+` outside brackets.

    Raises:
        ValueError: malformed text.
    """
    parts, depth = [""], 0
    for char in expression:
        depth += (char == "(") - (char == ")")
        if char == "+" and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    if depth or not all(re.fullmatch(r"[\w.:-]+(\(.*\))?", part.strip(), re.DOTALL) for part in parts):
        raise ValueError(f"method {expression!r} is malformed; write name, name(x, key=y) or a+b(x)")
    return [part.strip() for part in parts]


def parse_call(part: str) -> tuple[str, list, dict]:
    """Reads "mikv(16, low=2)" as ("mikv", [16], {"low": 2}); arguments are literals, never evaluated.

    Raises:
        ValueError: an argument that is no literal, or is given twice, or a number beyond any use.
    """
    name, bracket, _ = part.partition("(")
    if not bracket:
        return name, [], {}
    try:
        call = ast.parse(f"f({part[len(name) + 1 : -1]})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("brackets that are another's: f(1)(2), f(1) > (2)")
        args = [ast.literal_eval(a) for a in call.args]
        keywords = [(k.arg or "**", ast.literal_eval(k.value)) for k in call.keywords]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"method {part!r}: arguments must be plain numbers, strings or True/False") from None
    for value in (*args, *(value for _, value in keywords)):
        # Whatever it stands for: 1e999 is infinite, and a larger one no count of tokens.
        if isinstance(value, int | float) and not abs(value) <= LARGEST:
            raise ValueError(f"method {part!r}: a number is out of range; use -{LARGEST:,} to {LARGEST:,}")
    for name_of, times in Counter(name for name, _ in keywords).items():
        if times > 1:
            raise ValueError(f"method {part!r} has {name_of} {times} times; leave one")
    return name, args, dict(keywords)


def construct(cls: type[T], said: str, args: list, kwargs: dict, **more: Any) -> T:
    """An instance of a class from what `parse_call` read, and `more` that the text cannot say.

    Args:
        said: the text, for messages: "method 'snapkv(x=1)'".

    Raises:
        ValueError: an argument that is not known, missing, too many, or of another type than its field.
    """
    hints, takes = _hints(cls), signature(cls)
    takes = takes.replace(parameters=[one for name, one in takes.parameters.items() if name not in more])
    try:
        given = takes.bind(*args, **kwargs).arguments
        for name, value in given.items():
            kinds = _kinds(hint := hints.get(name, Any))
            if not kinds and hint is not Any:
                raise TypeError(f"{name}={value!r} is nothing that a text can say")
            if kinds and not (type(value) in kinds or (type(value) is int and float in kinds)):
                wanted = " or ".join(words for kind, words in _WORDS.items() if kind in kinds)
                raise ValueError(f"{said}: {name}={value!r} is not {wanted}")
        return cls(**given, **more)
    # Python names an argument that is missing or too many, but not those there are.
    except TypeError as error:
        # What may be None or something that no text says, as a cache's method, is no argument to be named.
        plain = [name for name in takes.parameters if _kinds(hints.get(name, Any)) - {NoneType}]
        raise ValueError(f"{said}: {error}; its arguments are: {', '.join(plain) or 'none'}") from None


@cache
def _hints(cls: type) -> dict[str, Any]:
    """Types of a class's fields; none where a name in them is there for type checkers alone."""
    try:
        return get_type_hints(cls)
    except NameError:
        return {}


def _kinds(hint: Any) -> set[type]:
    """The plain types that a value of a hint may have; none for a hint that says nothing, or not of plain values."""
    origin = get_origin(hint)
    if origin is Literal:
        return {type(value) for value in get_args(hint)}
    if origin in (Union, UnionType):
        return set().union(*(_kinds(one) for one in get_args(hint)))
    kind = origin or hint
    return {kind} if kind in _WORDS else set()


def whole(text: str) -> int:
    """A whole number as it is written: digits of ASCII behind a sign. Raises ValueError, also for 1_000 and full-width
    digits, which Python would read."""
    if not _WHOLE.fullmatch(text):
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def number(text: str) -> float:
    """A number as it is written: 0.4, 1e-3, or nan and inf, which no `whole` is. Raises ValueError as that does."""
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text!r} is not a number")
    return float(text)
