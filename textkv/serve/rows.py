"""Requests that wait together, answered as rows of one cache.

Rows of different lengths are padded on the left, and padding has no part in attention, scores or budgets: what a row
keeps and says is what it keeps and says alone. That is so for rows that take the likeliest token each time; what is
drawn by chance, must keep a schema, shows pictures, or goes on from a conversation is answered in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import StoppingCriteria

Done = Callable[[int, Any], None]
"""Hears the number of a row and its Outcome, or the exception that ended it, as soon as it is over."""


def stands_alone(prepared: Any) -> bool:
    """Whether a prepared request may be a row: text, greedy, and the first question of its conversation."""
    plain = prepared.options.get("do_sample") is False and "logits_processor" not in prepared.options
    return prepared.first and plain and set(prepared.inputs) == {"input_ids"}


def padded(prompts: Sequence[torch.Tensor], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts int64 [1, n] as rows int64 [batch, longest], `pad` on the left, and their mask, 0 there."""
    longest = max(ids.shape[1] for ids in prompts)
    rows = [F.pad(ids, (longest - ids.shape[1], 0), value=pad) for ids in prompts]
    masks = [F.pad(torch.ones_like(ids), (longest - ids.shape[1], 0)) for ids in prompts]
    return torch.cat(rows), torch.cat(masks)


@dataclass
class Row:
    """One request of several: who hears its tokens, and how many it may have.

    Attributes:
        growing: hears each token; for one row.
        limit: tokens of the answer.
        tokens: so many came.
    """

    growing: Any
    limit: int
    tokens: int = 0
    over: bool = False


class Rows(StoppingCriteria):
    """Hears every token of several rows, and ends each by itself.

    Args:
        rows: the requests.
        ends: ids that end an answer.
        columns: of the padded prompts.
        finish: called with a row's number, whether it ended of itself, and once.
    """

    def __init__(
        self, rows: Sequence[Row], ends: Sequence[int], columns: int, finish: Callable[[int, bool], None]
    ) -> None:
        self.rows, self.ends, self.seen, self.finish = rows, set(ends), columns, finish

    def __call__(self, input_ids: torch.Tensor, scores: Any, **ignored: Any) -> torch.Tensor:
        new = input_ids[:, self.seen :].tolist()
        self.seen = input_ids.shape[1]
        for number, (row, tokens) in enumerate(zip(self.rows, new, strict=True)):
            if not row.over:
                self._hear(number, row, tokens)
        return torch.tensor([row.over for row in self.rows], device=input_ids.device)

    def _hear(self, number: int, row: Row, tokens: Sequence[int]) -> None:
        row.tokens += len(tokens)
        ended = row.growing.hear(tokens) or (bool(tokens) and tokens[-1] in self.ends)
        if ended or row.growing.left or row.tokens >= row.limit:
            row.over = True
            self.finish(number, ended)
