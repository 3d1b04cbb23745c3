"""What turns texts into vectors for an index: a name, a folder, or a class of the user's own."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Protocol

import torch

from textkv.models.embedder import Embedder

BM25 = "bm25"
_CLASS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Embeds(Protocol):
    """Anything with `embed`: texts to fp32 [n, dim]."""

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """The vectors, on any device."""
        ...


def load_embedder(name: str) -> Embeds:
    """By name ("minilm"), folder, hub id, or "module:Class" (made without arguments).

    Raises:
        ValueError: a class that cannot be imported or does not embed.
        FileNotFoundError: nothing of that name (the message has the mend).
    """
    if not _CLASS.fullmatch(name):
        return Embedder.load(name)
    module, _, attribute = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"embedder {name}: {error}") from None
    if not callable(getattr(made, "embed", None)):
        raise ValueError(f"embedder {name} has no method embed(texts) that returns [n, dim]")
    return made
