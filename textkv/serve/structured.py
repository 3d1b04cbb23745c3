"""Answers that are JSON by construction: at every step only tokens may come that a schema still allows.

xgrammar compiles a JSON schema against a tokenizer; what is compiled is kept for the next request with the same one. A
constrained answer is well-formed as far as it goes: one that reaches its length limit is cut, and says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor

from textkv.serve.protocol import Wrong

if TYPE_CHECKING:
    import xgrammar

LONGEST = 100_000  # characters of a schema: compiling takes seconds per megabyte, and all would wait
KEPT = 64_000_000  # bytes of compiled schemas
UNKEPT = {
    "not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains", "dependencies",
    "dependentRequired", "dependentSchemas", "$dynamicRef", "$recursiveRef",
}  # fmt: skip
"""Keywords that xgrammar passes over in silence."""
EITHER = ("$ref", "anyOf", "oneOf", "allOf")
"""Where one of these stands, xgrammar looks at nothing beside it."""
ASKS = {
    "properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties",
    "maxProperties", "items", "prefixItems", "minItems", "maxItems", "enum", "const", "pattern", "format",
    "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", *EITHER,
}  # fmt: skip
_LETTERS, _WITHIN = re.compile(r"\\.|\[(?:\\.|[^\]])*\]", re.DOTALL), re.compile(r"[\^$]|\(\?<?[=!]")
_KINDS = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None), "object": dict,
    "array": list,
}  # fmt: skip
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords of which each value is a schema, under a name of the writer's own."""


class Schemas:
    """Compiles schemas for one model.

    Args:
        tokenizer: a fast tokenizer of transformers.
        columns: of the model's logits, which may be more than the tokenizer has tokens.
        ends: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, columns: int, ends: Sequence[int]) -> None:
        self._tokenizer, self._columns, self._ends = tokenizer, columns, list(ends)
        self._compiler: xgrammar.GrammarCompiler | None = None

    def processor(self, schema: dict[str, Any], prompt: int) -> Constrained:
        """A logits processor for one answer behind `prompt` columns.

        Raises:
            Wrong: xgrammar is not installed, or it cannot carry out this schema.
        """
        check_schema(schema)
        text = json.dumps(schema)
        if len(text) > LONGEST:
            raise _wrong(f"a schema of {len(text):,} characters; use at most {LONGEST:,}")
        compiler = self._compiler or self._made()
        try:
            # One blank at most between two parts: a small model would go on with empty lines to its limit.
            compiled = compiler.compile_json_schema(text, max_whitespace_cnt=1)
        except RuntimeError as error:
            # Its own message begins with a time and a line of its source.
            line = str(error).strip().rpartition("] ")[2].partition(": ")[2] or str(error)
            raise _wrong(f"this schema cannot be carried out: {line}") from None
        return Constrained(compiled, prompt)

    def _made(self) -> xgrammar.GrammarCompiler:
        try:
            import xgrammar
        except ImportError:
            raise _wrong("xgrammar is missing on the server: pip install 'agentkv[structured]'") from None
        if not self._ends:
            raise _wrong("the model names no token that ends an answer, so none could end")
        told = xgrammar.TokenizerInfo.from_huggingface(
            self._tokenizer, vocab_size=self._columns, stop_token_ids=self._ends
        )
        self._compiler = xgrammar.GrammarCompiler(told, max_threads=2, cache_limit_bytes=KEPT)
        return self._compiler


def check_schema(schema: Any, place: str = "") -> None:
    """Raises Wrong for what a JSON schema asks and xgrammar would pass over, so that answers would not keep it."""
    if not isinstance(schema, dict):
        return
    named = f" of {place}" if place else ""
    asked = [name for name in schema if schema[name] is not False]
    for name in (name for name in asked if name in UNKEPT):
        raise _wrong(f"{name}{named} is not carried out; leave it out of the schema")
    there = schema.get("$ref")
    if isinstance(there, str) and there != "#" and not there.startswith("#/"):
        raise _wrong(f"$ref{named} leads out of the schema by {there[:40]!r}; put what it means under $defs")
    _check_texts(schema, named)
    _check_values(schema, named)
    either = next((name for name in EITHER if name in asked), None)
    beside = [name for name in asked if name in ASKS and name != either]
    if either and beside:
        raise _wrong(f"{beside[0]}{named} beside {either} is not carried out; put it within, or leave it out")
    several = schema.get("allOf")
    if isinstance(several, list) and len(several) > 1:
        raise _wrong(f"allOf{named} of several schemas is not carried out; write them as one")
    for name, value in schema.items():
        inner = value.items() if name in NAMED and isinstance(value, dict) else [("", value)]
        parts = [(key, one) for key, part in inner for one in (part if isinstance(part, list) else [part])]
        for key, one in parts if name not in ("enum", "const", "default", "examples") else ():
            check_schema(one, ".".join(part for part in (place, name, key) if part))


def _check_texts(schema: dict[str, Any], named: str) -> None:
    for pattern in (schema.get("pattern"), *_keys(schema.get("patternProperties"))):
        # Nor would the library be silent: it writes the whole pattern to the server's log.
        if isinstance(pattern, str) and _WITHIN.search(_LETTERS.sub("x", pattern).removeprefix("^").removesuffix("$")):
            told = f"pattern{named} looks ahead or back, or has ^ or $ within it"
            raise _wrong(f"{told}, which is not carried out; put ^ and $ at its ends")
    form = next((name for name in ("pattern", "format") if name in schema), None)
    length = next((name for name in ("minLength", "maxLength") if name in schema), None)
    if form and length:
        raise _wrong(f"{length}{named} beside {form} is not carried out; say it in a pattern: ^[a-z]{{1,8}}$")


def _check_values(schema: dict[str, Any], named: str) -> None:
    if "const" in schema and "enum" in schema:
        raise _wrong(f"const{named} beside enum is not carried out; leave one out")
    told = schema.get("type")
    names = [name for name in (told if isinstance(told, list) else [told]) if isinstance(name, str)]
    kinds = [_KINDS[name] for name in names if name in _KINDS]
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema[x] for x in ("const",) if x in schema]
    for value in values if kinds else ():
        # True is an int to Python and none to JSON.
        if not any(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) for kind in kinds):
            raise _wrong(f"{json.dumps(value)[:40]}{named} is not of type {told}; leave one of them out")


def _keys(named: Any) -> list[str]:
    return list(named) if isinstance(named, dict) else []


def _wrong(line: str) -> Wrong:
    return Wrong(f"response_format: {line}", "response_format")


class Constrained(LogitsProcessor):
    """Leaves only the tokens that a compiled schema allows next; for one answer, of one row.

    Args:
        prompt: columns before the answer.
    """

    def __init__(self, compiled: xgrammar.CompiledGrammar, prompt: int) -> None:
        import xgrammar

        self._library, self._matcher = xgrammar, xgrammar.GrammarMatcher(compiled)
        self._allowed = xgrammar.allocate_token_bitmask(1, compiled.tokenizer_info.vocab_size)
        self._seen = prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [1, vocabulary], -inf at what may not come.

        Raises:
            ValueError: no token of the model can go on.
        """
        for token in input_ids[0, self._seen :].tolist():
            self._matcher.accept_token(token)
        self._seen = input_ids.shape[1]
        if self._matcher.is_terminated():
            return scores
        self._matcher.fill_next_token_bitmask(self._allowed, 0)
        if not bool(self._allowed.any()):
            raise ValueError("response_format: the model has no token with which this schema could go on")
        # In place, so of a copy: the caller may report the scores as they were.
        scores = scores.clone()
        self._library.apply_token_bitmask_inplace(scores, self._allowed.to(scores.device))
        return scores
