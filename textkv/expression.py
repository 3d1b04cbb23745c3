"""Composition strings: "name", "name(arg, key=value)", "a+b(x)". Text in, names and literals out; never evaluated."""

from __future__ import annotations

import ast
import re


def split_list(text: str) -> list[str]:
    """The parts of a comma-separated list of compositions, names or numbers, each once: commas inside brackets belong
    to a method's arguments."""
    return list(dict.fromkeys(part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()))


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
        ValueError: an argument that is no literal.
    """
    name, bracket, _ = part.partition("(")
    if not bracket:
        return name, [], {}
    try:
        call = ast.parse(f"f({part[len(name) + 1 : -1]})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("brackets that are another's: f(1)(2), f(1) > (2)")
        args = [ast.literal_eval(a) for a in call.args]
        kwargs = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"method {part!r}: arguments must be plain numbers, strings or True/False") from None
    return name, args, kwargs
