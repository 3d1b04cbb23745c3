"""Recorded tasks dealt out to workers, each with the model; the answers come to one place and are written there.

A job is one task for one cell: what a method learns, and what the model said before, stay in one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from agentkv.play import Plan
from agentkv.run import load, load_shared
from textkv.command import Ask, Crew

from .bench import Answer, Answers, Bench, Cell
from .records import Trajectory


class Worker:
    """One process's model, or `ask` in its place; other arguments as for `Bench`, with the plan of the model in place
    of its adapter.
    """

    def __init__(self, plan: Plan, ask: Ask | None, trajectories: Sequence[Trajectory], *how: Any) -> None:
        self.bench = Bench(trajectories, load(plan, weights=ask is None), *how, ask=ask)

    def answers(self, number: int, cell: Cell, known: Sequence[Answer]) -> list[Answer]:
        """What a cell answers to the task of that number, but for what is `known`."""
        return list(self.bench.task(self.bench.trajectories[number], cell, {one.key: one for one in known}))


def share(
    crew: Crew, plan: Plan, trajectories: Sequence[Trajectory], cells: Sequence[Cell], answers: Answers, *how: Any
) -> Iterator[Answer]:
    """Everything that `answers` lacks, in the order in which workers are done with it; each answer is added.

    Args:
        plan: of the model.
        how: the rest of `Bench`'s arguments.

    Raises:
        WorkerFailed: the model could not be opened, or workers keep dying.
    """
    jobs = [
        (number, cell, _known(answers, one, cell))
        for number, one in enumerate(trajectories)
        for cell in cells
        if answers.left(one, cell)
    ]
    if not jobs:
        return
    with crew.sharing(load_shared, plan) as ask, crew.open(Worker, plan, ask, trajectories, cells, *how) as there:
        for _, found in there.results(Worker.answers, jobs):
            for one in found:
                answers.add(one)
                yield one


def _known(answers: Answers, trajectory: Trajectory, cell: Cell) -> list[Answer]:
    """What a cell has answered to a task."""
    mine = (one for one in answers.done.values() if one.task == trajectory.task)
    return [one for one in mine if Cell(one.method, one.budget, one.screenshots) == cell]
