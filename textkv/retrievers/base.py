"""A retriever: chooses which of the tokens that wait in host memory a query is to see.

It never holds keys and values, only what it needs to choose. Shapes: keys [batch, kv_heads, n, head_dim], post-RoPE;
queries [batch, heads, 1, head_dim]; slots count the stored tokens, -1 where there is none.

A retriever of your own subclasses `Retriever`, takes a name by `register_retriever`, and is then saved, loaded and
copied with the segment that it belongs to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from textkv.registry import Registry

RETRIEVERS = Registry("retriever", "agentkv.retrievers", "textkv.retrievers.base.Retriever")
register_retriever = RETRIEVERS.register
"""Class decorator: makes a retriever known by the name under which it is saved."""


@dataclass
class Looked:
    """What retrieval has cost so far: keys or summaries compared with a query, of how many tokens that were stored, and
    tokens fetched; summed over queries, heads and rows."""

    compared: int = 0
    stored: int = 0
    fetched: int = 0


class Retriever(ABC):
    """See the module's docstring. One retriever serves all rows and heads of a layer.

    Attributes:
        length: slots that the index covers; a segment that stores another number refuses to ask.
        compared: keys or summaries that the last `query` compared, over all queries.
    """

    name = ""
    """Under which it is saved: set by `register_retriever`."""

    def __init__(self) -> None:
        self.length = 0
        self.compared = 0

    @abstractmethod
    def build(self, keys: torch.Tensor, positions: torch.Tensor, device: torch.device) -> None:
        """Builds the index of all stored tokens anew.

        Args:
            keys: [batch, kv_heads, n, head_dim] in host memory.
            positions: int32 [batch, kv_heads, n] on the CPU, logical positions, -1 = hole.
            device: where the model runs, and where what must answer at once may lie.
        """

    @abstractmethod
    def update(self, keys: torch.Tensor, positions: torch.Tensor) -> None:
        """Takes in new tokens: keys and positions of all stored ones as in `build`, the first `length` known before."""

    @abstractmethod
    def query(self, q: torch.Tensor, room: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The tokens that these queries are to see.

        Args:
            q: [batch, heads, 1, head_dim] on the model's device.
            room: int64 [batch] on the CPU, at most so many tokens for each head of a row.
            keys: what is stored, as in `build`.
            positions: its, as in `build`.

        Returns:
            int64 [batch, kv_heads or heads, c] on the CPU: slots, each at most once, -1 = none.
        """

    def keep(self, index: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, device: torch.device) -> None:
        """Tokens have left: new slot i is old slot index[..., i], int64 [batch, kv_heads, c] on the CPU (-1 = hole);
        `keys` and `positions` are what stays. The default builds anew."""
        self.build(keys, positions, device)

    def observe(self, q: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor | None) -> None:  # noqa: B027
        """A forward has attended: queries [batch, heads, m, head_dim] of tokens at int32 [batch, m], with their ids."""

    def crop(self, tokens: int, real: torch.Tensor | None = None) -> None:  # noqa: B027 (most remember no query)
        """The last `tokens` columns that it observed are taken back, of which `real` int64 [batch] on the CPU were
        tokens of each row; None = all."""

    def edge(self, before: torch.Tensor) -> torch.Tensor:
        """Where tokens may be cut off the recent ones to be moved here: for each row the last position, int64 [batch]
        on the CPU, that is not after `before` and splits nothing that belongs together."""
        return before

    def take_rows(self, rows: torch.Tensor) -> None:
        """New row i is old row rows[i], int64 [new batch]: every tensor's first axis is the batch."""
        for name, x in (self.tensors() | self.host_tensors()).items():
            setattr(self, name, x.index_select(0, rows.to(x.device)))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors on the model's device, by attribute."""
        return {}

    def host_tensors(self) -> dict[str, torch.Tensor]:
        """Tensors in host memory, by attribute."""
        return {}

    def library_bytes(self) -> int:
        """Bytes that a library holds in host memory for the index, beside all tensors."""
        return 0

    def state(self) -> dict[str, Any]:
        """Tensors and plain values from which `from_state` makes it again."""
        return dict(self.__dict__)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Retriever:
        """The retriever that had this `state()`. Tensors of `host_tensors()` come back to the host."""
        retriever = cls.__new__(cls)
        retriever.__dict__.update(state)
        for name, x in retriever.host_tensors().items():
            setattr(retriever, name, x.cpu())
        return retriever
