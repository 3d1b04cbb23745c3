"""A model answers every step of recorded tasks, with every cache method, budget and number of screenshots.

Every step is a prompt of its own, read afresh, as in the published evaluations. The history in it is the recording's
("teacher": what the annotator thought and did, in the model's words) or what the model itself said before ("own").
Answers go to disk one by one with their actions as atoms, so that another protocol scores them without the model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from agentkv.agent import Agent, Decision
from agentkv.grammars import Frame, ParseError
from agentkv.models import History
from agentkv.models.chat import ChatAdapter
from textkv.command import Ask
from textkv.method import resolve_method

from ..outcomes import Store
from .atoms import Atom, atoms_of, typed
from .flops import Shape
from .records import Step, Trajectory

MAX_NEW_TOKENS = 1000  # as in the published evaluations; a model that ends its answers stops long before
TEACHER, OWN = "teacher", "own"
REFUSED = "refused: "  # how the error of a method that could not begins
UNSEEN = (1000, 1000)  # pixels in which a step without a picture is told


@dataclass(frozen=True)
class Cell:
    """A cache method at a budget, and the number of screenshots in a prompt, the current one included."""

    method: str
    budget: str
    screenshots: int


@dataclass(frozen=True)
class Answer:
    """What one cell answered at one step.

    Attributes:
        method, budget, screenshots, task, step: the cell, and the step by its number in the recording.
        text: the reply.
        actions: its atoms as plain values, empty where nothing could be read.
        grammar: its name.
        error: why nothing could be read, or why the method could not; "" else.
        figures: tokens, bytes, seconds and FLOPs of this step.
    """

    method: str
    budget: str
    screenshots: int
    task: str
    step: int
    text: str
    actions: list[dict[str, Any]]
    grammar: str = ""
    error: str = ""
    figures: dict[str, float] | None = None

    @property
    def key(self) -> tuple[str, str, int, str, int]:
        """What tells answers apart."""
        return self.method, self.budget, self.screenshots, self.task, self.step

    def atoms(self) -> list[Atom]:
        """The actions as atoms."""
        return [Atom(**{k: tuple(v) if isinstance(v, list) else v for k, v in one.items()}) for one in self.actions]


class Answers(Store):
    """The answers of a model."""

    kind = Answer

    def left(self, trajectory: Trajectory, cell: Cell) -> int:
        """Steps of a task that a cell has not answered."""
        steps = (step for step in trajectory.steps if step.image is not None)
        return sum(key_of(cell, trajectory, step) not in self.done for step in steps)

    def in_order(self, trajectories: Sequence[Trajectory], cells: Sequence[Cell] = ()) -> list[Answer]:
        """All answers as one process gives them, whoever gave them first: by task, cell and step; those to other tasks,
        and of other cells, come last.
        """
        tasks = {one.task: number for number, one in enumerate(trajectories)}
        steps = {(one.task, step.number): number for one in trajectories for number, step in enumerate(one.steps)}
        places = {cell: number for number, cell in enumerate(cells)}

        def place(one: Answer) -> tuple[int, int, int]:
            cell = Cell(one.method, one.budget, one.screenshots)
            task, step = tasks.get(one.task, len(tasks)), steps.get((one.task, one.step), 0)
            return task, places.get(cell, len(places)), step

        return sorted(self.done.values(), key=place)


def key_of(cell: Cell, trajectory: Trajectory, step: Step) -> tuple[str, str, int, str, int]:
    """By what the answer of a cell to a step is found."""
    return cell.method, cell.budget, cell.screenshots, trajectory.task, step.number


class Bench:
    """Recorded tasks for one model.

    Args:
        adapter: the model; `Agent` switches its attention to textkv's.
        cells: all that is asked for.
        history: "teacher" or "own".
        ask: who answers in place of the adapter's model.
    """

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        adapter: ChatAdapter,
        cells: Sequence[Cell],
        history: str = TEACHER,
        max_new_tokens: int = MAX_NEW_TOKENS,
        ask: Ask | None = None,
    ) -> None:
        self.trajectories, self.adapter, self.cells, self.history = trajectories, adapter, cells, history
        self.grammar: str = adapter.grammar.name
        self.shape = Shape.of(adapter.model.config)
        kinds = {(cell.method, cell.budget) for cell in cells}
        self._frames: dict[tuple[int, int], Frame] = {}
        self._teacher: tuple[str, list[str]] = ("", [])  # the task that was told last, and what its annotator said
        self.agents = {kind: Agent(adapter, *kind, max_new_tokens, ask) for kind in kinds}
        self.remembering = {method for method, _ in kinds if resolve_method(method).remembers}

    def run(self, answers: Answers) -> Iterator[Answer]:
        """Everything that `answers` lacks, task by task; each answer is added as soon as it is there."""
        for trajectory in self.trajectories:
            for cell in self.cells:
                for one in self.task(trajectory, cell, answers.done):
                    answers.add(one)
                    yield one

    def task(self, trajectory: Trajectory, cell: Cell, done: Mapping[tuple, Answer]) -> Iterator[Answer]:
        """What one cell answers to one task, step by step, but for the answers that are in `done` by their keys."""
        said = list(self._said(trajectory))
        # What a method learns from steps is of one task and cell.
        self.agents[cell.method, cell.budget].start(None)
        missing = [s.number for s in trajectory.steps if s.image and key_of(cell, trajectory, s) not in done]
        for index, step in enumerate(trajectory.steps):
            if step.image is None:
                continue
            known = done.get(key_of(cell, trajectory, step))
            past = _past(trajectory.steps[:index], said, cell.screenshots)
            if known is None:
                known = self._answer(trajectory, step, cell, past)
                missing.remove(step.number)
                yield known
            elif missing and cell.method in self.remembering:
                # It is asked again for what the method learns from it; the answer is there.
                self._answer(trajectory, step, cell, past)
            if self.history == OWN:
                said[index] = known.text

    def _said(self, trajectory: Trajectory) -> list[str]:
        """What the annotator of a task did, as the model would have said it; kept for the task's other cells."""
        if self._teacher[0] != trajectory.task:
            self._teacher = trajectory.task, [self._told(trajectory, step) for step in trajectory.steps]
        return self._teacher[1]

    def _answer(self, trajectory: Trajectory, step: Step, cell: Cell, past: History) -> Answer:
        picture, grammar = _picture(step.image), self.grammar
        about = (*asdict(cell).values(), trajectory.task, step.number)
        try:
            decision = self.agents[cell.method, cell.budget].decide(trajectory.goal, past, picture, picture.size)
        except ValueError as error:  # a budget that leaves a method no slot, a head size that it cannot pack
            print(f"{trajectory.task} step {step.number}, {cell.method} at {cell.budget}: {error}", file=sys.stderr)
            return Answer(*about, "", [], grammar, f"{REFUSED}{error}")
        reading = self.adapter.read(decision.text, decision.frame)
        if isinstance(reading, ParseError):
            return Answer(*about, decision.text, [], grammar, reading.reason, self._figures(decision))
        atoms = atoms_of(reading.actions, picture.size, grammar, trajectory.mac)
        return Answer(*about, decision.text, [asdict(x) for x in atoms], grammar, "", self._figures(decision))

    def _figures(self, decision: Decision) -> dict[str, float]:
        """By the names that they have in rows; FLOPs of the first decoded token."""
        names = ("kv_bytes", "kv_bytes_peak", "kv_bytes_full", "tokens_stored", "seconds_prefill", "seconds_decode")
        found: dict[str, float] = {"prefill_tokens": decision.prompt_tokens, "decode_tokens": decision.decode_tokens}
        found["visual_tokens"] = sum(end - start for start, end in decision.spans)
        found |= {name: getattr(decision, name) for name in names}
        if self.shape is not None:
            for suffix, tokens in (("", decision.tokens_stored), ("_full", decision.prompt_tokens)):
                found[f"decode_flops_attention{suffix}"] = self.shape.attention(tokens + 1)
                found[f"decode_flops{suffix}"] = self.shape.model(tokens + 1)
        return found

    def _told(self, trajectory: Trajectory, step: Step) -> str:
        """What the annotator did at a step as this model would have said it; the recorded code where the model's
        grammar has no words for it.
        """
        size = UNSEEN if step.image is None else _picture(step.image).size
        try:
            actions = typed(step.options[0], size, self.grammar)
            call = "\n\n".join(self.adapter.render(action, self._frame(size)) for action in actions)
        except ValueError:
            call = step.code
        return self.adapter.reply(step.thought, step.instruction, call)

    def _frame(self, size: tuple[int, int]) -> Frame:
        """How the model counts on a picture of that size."""
        if size not in self._frames:
            self._frames[size] = self.adapter.prompt("", (), Image.new("RGB", size)).frames[-1]
        return self._frames[size]


def _past(steps: Sequence[Step], said: Sequence[str], screenshots: int) -> History:
    """The history before a step: all answers, and the last `screenshots` - 1 pictures."""
    first = len(steps) - screenshots + 1
    return [
        (_picture(step.image) if index >= first and step.image is not None else None, text)
        for index, (step, text) in enumerate(zip(steps, said, strict=False))
    ]


@lru_cache(maxsize=8)
def _picture(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")
