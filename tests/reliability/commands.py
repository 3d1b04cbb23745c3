"""Every command of the repository, found by `if __name__ == "__main__"`, and the options that it takes."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from textkv._start import missing_extra

ROOT = Path(__file__).parents[2]
FOLDERS = ("agentkv", "dlm", "envs", "eval", "kernels", "textkv", "training")
HANDED_ON = {("eval.speed", "decode"): "eval.decode_speed"}
"""Commands that another one hands its arguments to, with the module that they are in."""

INNER = {"eval.peers.kvpress_side", "textkv.command._watch"}
"""Started by other commands alone, by their paths."""
ELSEWHERE = {"textkv.methods.duo_attention": "textkv.duo.identify"}
"""Where `main` is, for a method that is a command only as it is run."""


@dataclass(frozen=True)
class Command:
    """A command or a command below one: `words` go before its options."""

    name: str
    words: tuple[str, ...]
    parser: argparse.ArgumentParser
    main: Callable[[list[str]], int]

    @property
    def title(self) -> str:
        """As one types it behind `python -m`."""
        return " ".join((self.name, *self.words))

    @property
    def options(self) -> list[argparse.Action]:
        """Those that take a value."""
        return [x for x in self.parser._actions if x.nargs != 0 and not isinstance(x, argparse._SubParsersAction)]


def names() -> list[str]:
    """Names of all modules that are run with `python -m`."""
    found = []
    for path in sorted(x for folder in FOLDERS for x in (ROOT / folder).rglob("*.py")):
        if any(_is_guard(node) for node in ast.parse(path.read_text(encoding="utf-8")).body):
            found.append(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__"))
    return [name for name in found if name not in INNER]


def _is_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


@cache
def commands() -> tuple[Command, ...]:
    """All of them, those below others in their place."""
    return tuple(x for name in names() if name not in lacking() for x in _commands_of(name))


@cache
def lacking() -> dict[str, str]:
    """The commands that cannot begin here, with the line that names the extra that is not installed."""
    found = {}
    for name in names():
        try:
            _module(name)
        except ImportError as error:
            told = missing_extra(error)
            if told is None:
                raise
            found[name] = told
    return found


def _module(name: str) -> ModuleType:
    """The module that has the command's `main`."""
    name = ELSEWHERE.get(name, name)
    return import_module(f"{name}.__main__" if ROOT.joinpath(*name.split(".")).is_dir() else name)


def _commands_of(name: str) -> Iterator[Command]:
    main = _module(name).main
    module = sys.modules[main.__module__]
    yield from _below(name, (), module.parser(), main)
    for (parent, word), other in HANDED_ON.items():
        if parent == name:
            yield Command(name, (word,), import_module(other).parser(), main)


def _below(name: str, words: tuple[str, ...], parser: argparse.ArgumentParser, main: Callable) -> Iterator[Command]:
    groups = [x for x in parser._actions if isinstance(x, argparse._SubParsersAction)]
    if not groups and parser.add_help:  # without, its words are another command's
        yield Command(name, words, parser, main)
    for group in groups:
        for word, below in group.choices.items():
            yield from _below(name, (*words, word), below, main)
