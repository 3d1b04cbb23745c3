"""Every hostile reply is a value with a reason, quickly, and runs nothing."""

from __future__ import annotations

import builtins
import subprocess
import time

import pytest

from agentkv.grammars import corpus, fuzz
from agentkv.grammars.base import Frame, Grammar, ParseError

FRAME = Frame((280, 280), (280, 280))
MODULES = {name: fuzz.GRAMMARS[name] for name in corpus.REFUSED}
LIMIT = 0.05  # seconds of this process


def quickest(module: Grammar, text: str) -> float:
    """Seconds of one `parse`, the least of up to three."""
    least = 1.0
    for _ in range(3):
        start = time.process_time()
        module.parse(text, FRAME)
        least = min(least, time.process_time() - start)
        if least < LIMIT:
            break
    return least


@pytest.mark.parametrize(
    ("grammar", "text", "reason"),
    [
        pytest.param(grammar, text, reason, id=f"{grammar}-{number}-{reason[:30]}")
        for grammar, rows in corpus.REFUSED.items()
        for number, (text, reason) in enumerate(rows)
    ],
)
def test_refused_with_a_reason_and_quickly(grammar: str, text: str, reason: str) -> None:
    module = MODULES[grammar]
    for reader in (module.parse, module.read, module.parse_all):
        refused = reader(text, FRAME)
        assert isinstance(refused, ParseError)
        assert reason in refused.reason
        assert len(refused.reason) < 400
        assert 0 <= refused.position <= len(text)
    assert quickest(module, text) < LIMIT


@pytest.mark.parametrize("grammar", MODULES)
@pytest.mark.parametrize("other", corpus.REFUSED)
def test_nothing_is_executed(grammar: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.compile

    def only_trees(source: object, name: str, mode: str, flags: int = 0, *rest: object, **named: object) -> object:
        assert flags & 0x400, "code was compiled, not only parsed"  # ast.PyCF_ONLY_AST
        return real(source, name, mode, flags, *rest, **named)  # type: ignore[call-overload]

    def fail(*args: object, **named: object) -> None:
        raise AssertionError("a reply was executed")

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "compile", only_trees)
        for name in ("eval", "exec", "open"):
            patched.setattr(builtins, name, fail)
        patched.setattr(subprocess, "Popen", fail)
        found = [MODULES[grammar].parse(text, FRAME) for text, _ in corpus.REFUSED[other]]
    assert len(found) == len(corpus.REFUSED[other])
