"""Every command of the repository, found by `if __name__ == "__main__"`, and the options that it takes."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from textkv._start import EXTRAS, missing_extra

ROOT = Path(__file__).parents[2]
FOLDERS = ("agentkv", "dlm", "envs", "eval", "kernels", "textkv", "training")
HANDED_ON = {
    ("eval.speed", "decode"): "eval.decode_speed",
    ("eval.speed", "dlm"): "eval.dlm_speed",
    ("eval.speed", "rows"): "eval.dlm_rows",
}
"""Commands that another one hands its arguments to, with the module that they are in."""

INNER = {"eval.peers.kvpress_side", "textkv.command._watch", "textkv.command._guard"}
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
    lacking()
    return tuple(x for name in names() for x in _commands_of(name))


@cache
def lacking() -> dict[str, str]:
    """The commands that cannot begin here, with the line that names the extra that is not installed; their modules can
    be imported afterwards.
    """
    found = {}
    for name in names():
        try:
            _module(name)
        except ImportError as error:
            told = missing_extra(error)
            if told is None:
                raise
            found[name] = told
            with extras_played():
                _module(name)
    return found


class _Anything(ModuleType):
    """A package that is not installed: each of its names is an empty class."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Player(MetaPathFinder, Loader):
    """Finds packages of extras that are not installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """A stand-in, for those alone."""
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in EXTRAS else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty one."""
        return _Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


@contextmanager
def extras_played() -> Iterator[None]:
    """A context in which what lacks an extra can be imported, so that its options are looked at too."""
    player, before = _Player(), set(sys.modules)
    sys.meta_path.append(player)  # last: what is installed is found first
    try:
        yield
    finally:
        sys.meta_path.remove(player)
        for name in set(sys.modules) - before:
            if isinstance(sys.modules[name], _Anything):
                del sys.modules[name]


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
