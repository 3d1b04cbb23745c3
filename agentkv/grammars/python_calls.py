"""Calls of Python syntax read as data: text -> `Statement(module, function, positional and named literals)`.

`ast` builds the tree; nothing is compiled, run or looked up. A statement is a call of one of the given modules'
functions with literal arguments, or an import of such a module, which is passed over; anything else rejects all of it.
What reaches `ast` is bounded first (few characters outside strings, shallow brackets, no f-strings or bytes), because
Python's parser takes long or much memory on some short texts.
"""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass
from itertools import chain
from typing import Any

from agentkv.grammars.base import Reject

MAX_CODE = 4096
MAX_DEPTH = 4
Literal = str | int | float | bool | None | tuple[str, ...]

# A comment, or a string and its end (the groups), or all of one that does not end; matches at every quote: linear.
_PIECE = re.compile(
    r"""\#[^\r\n]*+
    |'''(?:[^'\\]++|\\(?:.|\Z)|'(?!''))*+(''')?
    |\"\"\"(?:[^"\\]++|\\(?:.|\Z)|"(?!""))*+(\"\"\")?
    |'(?:[^'\\\r\n]++|\\(?:.|\Z))*+(')?
    |"(?:[^"\\\r\n]++|\\(?:.|\Z))*+(")?""",
    re.VERBOSE | re.DOTALL,
)
# where Python breaks lines, unlike str.splitlines, which knows more ends
_LINES = re.compile(r"(?<=\n)|(?<=\r)(?!\n)")
_BRACKETS = re.compile(r"[()\[\]{}]")
_REFUSED = {
    ast.JoinedStr: "an f-string",
    ast.Starred: "a starred argument",
    ast.Call: "a nested call",
    ast.Lambda: "a lambda",
    ast.BinOp: "arithmetic",
    ast.BoolOp: "a condition",
    ast.Compare: "a comparison",
    ast.Subscript: "a subscript",
    ast.Dict: "a dictionary",
    ast.Set: "a set",
    ast.NamedExpr: "an assignment",
    ast.Assign: "an assignment",
    ast.AugAssign: "an assignment",
    ast.AnnAssign: "an assignment",
    ast.Import: "an import",
    ast.ImportFrom: "an import",
    ast.For: "a loop",
    ast.While: "a loop",
}


@dataclass(frozen=True)
class Statement:
    """One call: `module.function(*positional, **named)`; `at` is its place in the text."""

    module: str
    function: str
    positional: tuple[Literal, ...]
    named: dict[str, Literal]
    at: int

    @property
    def name(self) -> str:
        """What is called, as it is written: "module.function"."""
        return f"{self.module}.{self.function}"


class _Unreadable(Exception):
    """The text is not Python; the lines before may be."""

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(reason)
        self.reject = Reject(reason, position)


def statements(code: str, offset: int, modules: tuple[str, ...]) -> tuple[list[Statement], str]:
    """The calls in `code`, which begins at `offset` of the reply, and which later part could not be read and why, "" if
    all could.

    Raises `Reject` for anything but such calls, and for code of which not even the first line can be read.
    """
    try:
        return _calls(code, offset, modules), ""
    except _Unreadable as unreadable:
        found, all_read = _leading_lines(code, offset, modules)
        if not found:
            raise unreadable.reject from None
        if all_read:  # lines that are indented are as good
            return found, ""
        return found, f"what follows the first {len(found)} was left out: {unreadable.reject.error.reason}"


def _leading_lines(code: str, offset: int, modules: tuple[str, ...]) -> tuple[list[Statement], bool]:
    found: list[Statement] = []
    for line in _LINES.split(code):
        words = line.strip()
        if words and not words.startswith("#"):
            try:
                found += _calls(words, offset + line.index(words), modules)
            except _Unreadable:
                return found, False
        offset += len(line)
    return found, True


def _calls(code: str, offset: int, modules: tuple[str, ...]) -> list[Statement]:
    _bound(code, offset)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a string is a warning
            tree = ast.parse(code)
    except SyntaxError as error:
        lines = _LINES.split(code)[: max((error.lineno or 1) - 1, 0)]
        raise _Unreadable(f"the code is not Python: {error.msg}", offset + sum(map(len, lines))) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise _Unreadable(f"the code is not Python: {type(error).__name__}", offset) from None
    place = _Places(code, offset)
    return [_call(node, place, modules) for node in tree.body if not _harmless_import(node, modules)]


def _bound(code: str, offset: int) -> None:
    """Rejects code that could cost the parser much."""
    outside, end, depth = 0, 0, 0
    for piece in chain(_PIECE.finditer(code), [None]):
        between = code[end : piece.start() if piece else None]
        if not between.isascii():
            raise Reject("the code has characters outside its strings that are not ASCII", offset + end)
        outside += len(between) - sum(map(between.count, " \n\r\t")) + 2
        for bracket in _BRACKETS.findall(between):
            depth += 1 if bracket in "([{" else -1
            if depth > MAX_DEPTH:
                raise Reject(f"the code nests brackets deeper than {MAX_DEPTH}", offset + end)
        if outside > MAX_CODE:
            raise Reject(f"the code has more than {MAX_CODE} characters outside its strings", offset + end)
        if piece and piece[0][0] != "#":
            _check_string(code, piece, offset)
        end = piece.end() if piece else end


def _check_string(code: str, piece: re.Match[str], offset: int) -> None:
    start = piece.start()
    prefix = code[start - 1 : start] if start else ""
    if prefix.isalnum() and (prefix not in "rRuU" or code[max(start - 2, 0) : start - 1].isalnum()):
        kind = "an f-string" if prefix in "fF" else f"a string with the prefix {prefix!r}"
        raise Reject(f"{kind} is not a plain string", offset + start - 1)
    if piece.lastindex is None:
        raise _Unreadable("a string does not end", offset + start)


class _Places:
    """Positions in the reply of nodes, which count lines and UTF-8 bytes."""

    def __init__(self, code: str, offset: int) -> None:
        self.offset = offset
        self.lines = _LINES.split(code)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def __call__(self, node: ast.AST) -> int:
        row, column = getattr(node, "lineno", 1) - 1, getattr(node, "col_offset", 0)
        row = min(row, len(self.lines) - 1)
        before = self.lines[row].encode(errors="replace")[:column].decode(errors="ignore")
        return self.offset + self.starts[row] + len(before)


def _harmless_import(node: ast.stmt, modules: tuple[str, ...]) -> bool:
    return isinstance(node, ast.Import) and all(alias.name in modules and not alias.asname for alias in node.names)


def _call(node: ast.stmt, place: _Places, modules: tuple[str, ...]) -> Statement:
    call = node.value if isinstance(node, ast.Expr) else node
    if not isinstance(call, ast.Call):
        raise Reject(f"{_kind(call)} is not allowed; write calls of {modules[0]}", place(call))
    function = call.func
    if not (isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)):
        what = f"{function.id[:40]!r}" if isinstance(function, ast.Name) else _kind(function)
        raise Reject(f"a call of {what} is not allowed; write calls of {modules[0]}", place(call))
    if function.value.id not in modules:
        raise Reject(f"{function.value.id[:40]!r} is not one of {', '.join(modules)}", place(call))
    named: dict[str, Literal] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise Reject("a starred argument is not allowed", place(keyword))
        if keyword.arg in named:
            raise Reject(f"argument {keyword.arg[:40]!r} is given twice", place(keyword))
        named[keyword.arg] = _literal(keyword.value, place)
    positional = tuple(_literal(value, place) for value in call.args)
    return Statement(function.value.id, function.attr, positional, named, place(call))


def _literal(node: ast.expr, place: _Places) -> Literal:
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=ast.Constant(value=int() | float() as value)) if (
            not isinstance(value, bool)
        ):
            return -value if isinstance(sign, ast.USub) else value
        case ast.List(elts=items) | ast.Tuple(elts=items) if all(
            isinstance(item, ast.Constant) and isinstance(item.value, str) for item in items
        ):
            return tuple(item.value for item in items)  # type: ignore[attr-defined]
    raise Reject(f"{_kind(node)} is not allowed; write numbers and strings", place(node))


def _kind(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return f"the name {node.id[:40]!r}"
    if isinstance(node, ast.Attribute):
        return f"the attribute {node.attr[:40]!r}"
    if isinstance(node, ast.Constant):
        return f"a constant of type {type(node.value).__name__}"
    return _REFUSED.get(type(node), f"Python's {type(node).__name__}")


def literal(code: str, offset: int) -> Any:
    """A literal of Python's syntax as data: numbers, texts, None, True, False, and lists, tuples and dicts of them.

    Raises `Reject` for anything else, and for what could cost the parser much.
    """
    try:
        _bound(code, offset)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code, mode="eval")
    except _Unreadable as unreadable:
        raise unreadable.reject from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Reject(f"the code is not Python: {type(error).__name__}", offset) from None
    return _data(tree.body, _Places(code, offset))


def _data(node: ast.expr, place: _Places) -> Any:
    match node:
        case ast.Dict(keys=keys, values=values):
            names = [_data(key, place) if key is not None else None for key in keys]
            if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
                raise Reject("a key is no text, or is given twice", place(node))
            return dict(zip(names, (_data(value, place) for value in values), strict=True))
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_data(item, place) for item in items]
        case ast.Constant(value=bool() as value):
            return value
    return _literal(node, place)
