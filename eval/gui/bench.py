"""A model answers every question of a benchmark, with every cache method and budget; answers go to disk one by one."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from agentkv.agent import Agent, Decision
from agentkv.envs.actions import parts
from agentkv.grammars import ParseError
from agentkv.models.base import ModelAdapter

from ..leaderboard import Cell
from ..outcomes import Store
from .items import Benchmark, Item

REFUSED = "refused: "  # how the error of a method that could not begins
FIGURES = (
    "kv_bytes", "kv_bytes_peak", "kv_bytes_full", "tokens_stored", "decode_tokens", "seconds_prefill", "seconds_decode",
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What one cell answered to one question.

    Attributes:
        method, budget, item: the cell, and the question's name.
        text: the reply.
        scores: by the benchmark's metrics.
        error: why nothing could be read, or why the method could not; "" else.
        figures: tokens, bytes and seconds.
    """

    method: str
    budget: str
    item: str
    text: str
    scores: dict[str, float]
    error: str = ""
    figures: dict[str, float] | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells answers apart."""
        return self.method, self.budget, self.item


class Answers(Store):
    """The answers of a model."""

    kind = Answer


class Bench:
    """Questions for one model. Every one is a prompt of its own, with one screenshot; earlier steps are words in it.

    Args:
        cells: methods and budgets.
        max_new_tokens: limit of one answer; None = the family's.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        items: Sequence[Item],
        adapter: ModelAdapter,
        cells: Sequence[Cell],
        max_new_tokens: int | None = None,
    ) -> None:
        self.benchmark, self.items, self.adapter, self.cells = benchmark, items, adapter, cells
        self.agents = {cell: Agent(adapter, *cell, max_new_tokens) for cell in cells}

    def left(self, answers: Answers) -> int:
        """Questions times cells that `answers` lacks."""
        return sum((*cell, item.name) not in answers.done for item in self.items for cell in self.cells)

    def run(self, answers: Answers) -> Iterator[Answer]:
        """Everything that `answers` lacks, question by question; each answer is added as soon as it is there."""
        for item in self.items:
            for cell in self.cells:
                if (*cell, item.name) not in answers.done:
                    # Questions are asked alone: nothing is learned from one for the next.
                    self.agents[cell].start(None)
                    answer = self._answer(item, cell)
                    answers.add(answer)
                    yield answer

    def _answer(self, item: Item, cell: Cell) -> Answer:
        none = dict.fromkeys(self.benchmark.metrics, 0.0)
        with Image.open(item.image) as picture:
            shown = picture.convert("RGB")
        past = [(None, text) for text in item.before]
        try:
            decision = self.agents[cell].decide(item.goal, past, shown, shown.size)
        except ValueError as error:  # a budget that leaves a method no slot
            print(f"{item.name}, {cell[0]} at {cell[1]}: {error}", file=sys.stderr)
            return Answer(*cell, item.name, "", none, f"{REFUSED}{error}")
        if isinstance(decision.action, ParseError):
            return Answer(*cell, item.name, decision.text, none, decision.action.reason, _figures(decision))
        scores = self.benchmark.score(item.sized(shown.size), parts(decision.action), shown.size)
        return Answer(*cell, item.name, decision.text, scores, "", _figures(decision))


def _figures(decision: Decision) -> dict[str, float]:
    found: dict[str, Any] = {name: getattr(decision, name) for name in FIGURES}
    found["visual_tokens"] = sum(end - start for start, end in decision.spans)
    return found | {"prefill_tokens": decision.prompt_tokens}
