"""The calls in a reply: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, or in XML
`<tool_call><function=NAME><parameter=KEY>value</parameter></function></tool_call>` -> name, arguments, position.

| slip | rule |
|---|---|
| a dict in Python's spelling: `{'name': ...}` | where it is no JSON, a literal of Python's syntax is read (as data) |
| raw line breaks in a JSON text | are line breaks |
| `"arguments"` as a string | the JSON in it is read |
| a garbled closing tag behind complete JSON: `}}</tool`, `}} or so` | what follows is passed over up to the next \
`<tool_call>`, flag "unclosed" |
| one or two closing braces missing before `</tool_call>` | they are added |
| no tags at all | a JSON object with "name" and "arguments" that begins a line is a call; so is `<function=..>` alone |
| a fence inside the tags | is passed over |
| several objects inside one pair of tags | are several calls |
| `</function>` is missing before `</tool_call>` | is taken as written, flag "unclosed" |
| further keys beside name and arguments | passed over |
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from agentkv.grammars.base import Reject, shown
from agentkv.grammars.python_calls import literal

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"\s*+<function=([^<>\r\n]{1,80})>")
_PARAMETER = re.compile(r"\s*+<parameter=([^<>\r\n]{1,80})>\r?\n?")
_PARAMETER_END = re.compile(r"\r?\n?</parameter>(?=\s*+(?:<parameter=|</function>|</tool_call>|\Z))")
_FUNCTION_END = re.compile(r"\s*+</function>")
_BARE = re.compile(
    r"^[ \t]{0,16}(?=\{[^\r\n]*\"name\"[^\r\n]*\"arguments\"|\{\s{0,80}+['\"]name['\"]\s{0,8}:)|(?=<function=)",
    re.MULTILINE,
)
_FENCE = re.compile(r"\s*+```(?:json|xml)?[ \t]*+\r?\n")


@dataclass(frozen=True)
class Found:
    """One call as it was written; `at` is its place in the reply, `prose` what stands before the first call."""

    tool: str
    arguments: dict[str, Any]
    at: int
    prose: str = ""


def calls(text: str, begin: int, flags: set[str]) -> Iterator[Found]:
    """The calls from `begin` on, in order; raises `Reject` at one that cannot be read, and if there is none."""
    opening = text.find(OPEN, begin)
    tagged = opening >= 0
    if not tagged:
        bare = _BARE.search(text, begin)
        if bare is None:
            raise Reject(f"no {OPEN} found", 0)
        opening = bare.end()
    prose = text[begin:opening].strip()
    while opening >= 0:
        at = opening + len(OPEN) if text.startswith(OPEN, opening) else opening
        fence = _FENCE.match(text, at)
        at = fence.end() if fence else at
        function = _FUNCTION.match(text, at)
        found, end = _xml(text, function, opening, flags) if function else _json(text, at, opening)
        yield Found(*found, opening, prose)
        closing = _skip(text, end)
        if text.startswith("{", closing):  # the next one, between the same tags
            opening = closing
        elif tagged:
            if not text.startswith(CLOSE, _fence_end(text, closing)):
                flags.add("unclosed")
            opening = text.find(OPEN, closing)
        else:
            bare = _BARE.search(text, end)
            opening = bare.end() if bare else -1


def _fence_end(text: str, at: int) -> int:
    return _skip(text, at + 3) if text.startswith("```", at) else at


def _skip(text: str, at: int) -> int:
    return re.compile(r"\s*+").match(text, at).end()  # type: ignore[union-attr]


def _xml(text: str, function: re.Match[str], opening: int, flags: set[str]) -> tuple[tuple[str, dict[str, Any]], int]:
    arguments: dict[str, Any] = {}
    at = function.end()
    while parameter := _PARAMETER.match(text, at):
        end = _PARAMETER_END.search(text, parameter.end())
        if end is None:
            raise Reject(f"the parameter {parameter[1][:40]!r} does not end", parameter.start())
        if parameter[1] in arguments:
            raise Reject(f"the parameter {parameter[1][:40]!r} is given twice", parameter.start())
        arguments[parameter[1]] = text[parameter.end() : end.start()]
        at = end.end()
    close = _FUNCTION_END.match(text, at)
    if close is None and text.startswith(CLOSE, _skip(text, at)):
        flags.add("unclosed")
        return (function[1].strip(), arguments), at
    if close is None:
        raise Reject(f"expected </function>, found {text[at : at + 20]!r}", at)
    return (function[1].strip(), arguments), close.end()


def _json(text: str, at: int, opening: int) -> tuple[tuple[str, dict[str, Any]], int]:
    value, end = object_at(text, at)
    if not isinstance(value, dict) or "name" not in value or "arguments" not in value:
        raise Reject("the call is not an object with a name and arguments", opening)
    arguments = value["arguments"]
    if isinstance(arguments, str):
        arguments, _ = object_at(arguments, 0)
    if not isinstance(arguments, dict):
        raise Reject(f"the arguments are {shown(arguments)}, not an object", opening)
    if not isinstance(value["name"], str):
        raise Reject(f"{shown(value['name'])} is not the name of a tool", opening)
    return (value["name"].strip(), arguments), end


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not a number of JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant, strict=False)


def object_at(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at `at`, and where it ends; raises `Reject` with what JSON says of it."""
    begin = _skip(text, at)
    try:
        return _DECODER.raw_decode(text, begin)
    except json.JSONDecodeError as error:
        mended = _mended(text, begin)
        if mended is not None:
            return mended
        raise Reject(f"the call is not JSON: {error.msg}", error.pos) from None
    except ValueError as error:  # a hook's, or an integer of thousands of digits
        raise Reject(f"the call is not JSON: {str(error)[:60]}", at) from None
    except RecursionError:
        raise Reject("the call is not JSON: nested too deeply", at) from None


def _mended(text: str, begin: int) -> tuple[Any, int] | None:
    """What stands up to the closing tag as a literal of Python, or as JSON with the braces that are missing."""
    closing = text.find(CLOSE, begin)
    end = len(text) if closing < 0 else closing
    body = text[begin:end].strip()
    if not body.startswith("{"):
        return None
    with suppress(Reject):  # no literal: perhaps braces are missing
        return literal(body, begin), end
    for braces in ("}", "}}") if closing >= 0 else ():
        try:
            return _DECODER.decode(body + braces), end
        except (ValueError, RecursionError):
            continue
    return None
