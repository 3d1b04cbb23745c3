"""Types of arguments that know caches and devices; those of any command are in `textkv.command`."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable

from textkv.budgets import Budget
from textkv.command import checked, names
from textkv.devices import device_of
from textkv.method import resolve_method


@checked
def budget(text: str) -> str:
    """What a cache may keep, as methods are told it: a share in (0, 1], or tokens as 512t."""
    return str(Budget.parse(text))


@checked
def budgets(text: str) -> list[str]:
    """Comma-separated budgets, at least one, each once."""
    return list(dict.fromkeys(str(Budget.parse(part)) for part in names(text)))


@checked
def method(text: str) -> str:
    """One cache method or composition that can be built."""
    resolve_method(text)
    return text


def methods(*others: str) -> Callable[[str], list[str]]:
    """The type of comma-separated cache methods and compositions, at least one; each can be built.

    Args:
        others: what may be named beside methods: a word, as "all", or how such words begin, as "hf-".
    """

    def check(text: str) -> list[str]:
        """The names."""
        found = names(text)
        for method in found:
            if not any(method == word or (word.endswith("-") and method.startswith(word)) for word in others):
                resolve_method(method)
        return found

    check.__name__ = "methods"
    return checked(check)


def device(text: str) -> str:
    """A device of torch that is there; "" = a GPU where there is one."""
    try:
        return device_of(text)
    except (ValueError, RuntimeError) as error:
        raise ArgumentTypeError(str(error)) from None
