"""Rows, tables and curves from answers: accuracy per cell, task and action type, and what it cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from agentkv.tables import format_bytes
from textkv import Budget

from ..bootstrap import clustered
from ..curve import draw_curve
from ..outcomes import ALL
from .atoms import TARS, as_released
from .bench import REFUSED, Answer, Cell
from .records import Step, Trajectory
from .scoring import Score, scorable, score

REPLAY = "replay"
COSTS = ("tokens in", "KV at rest", "of full", "prefill s", "decode s")
UNITS = {
    "accuracy": "mean step score over n steps, 0..1; replies that cannot be read count 0",
    "low, high": "95 % by bootstrap over tasks; in a row of one task over its steps",
    "accuracy_scorable": "the same over the steps that can earn 1; unscorable counts the others (hscroll, wait ...)",
    "change": "accuracy minus that of `against`, the first method named at this budget and number of screenshots, on "
    "the steps that both met; change_low, change_high: 95 % by bootstrap over tasks",
    "type": "mean of that action type over the n steps that ask for it",
    "screenshots": "in a prompt, the current one included; 0 where there was no prompt (replay)",
    "prefill_tokens, decode_tokens, visual_tokens": "mean per step",
    "tokens_stored": "mean per step, over layers and heads",
    "kv_bytes": "held right after the prompt was compressed, mean per step; kv_share: of kv_bytes_full",
    "kv_bytes_full": "held by the full cache at that moment",
    "kv_bytes_peak": "most bytes held at any moment of any step",
    "seconds_prefill, seconds_decode": "mean per step; seconds: their sum",
    "decode_flops_attention, decode_flops": "of the first decoded token by formula: attention modules, whole decoder",
    "unreadable, refused": "steps whose reply could not be read; whose prompt the method could not take",
}


@dataclass(frozen=True)
class Scored:
    """One step with its score; `answer` is None where the ground truth answered."""

    task: str
    step: Step
    score: Score
    answer: Answer | None = None


def replay_rows(trajectories: Sequence[Trajectory], protocols: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of an agent that does what was recorded as right: 1.0 on every step that can be scored."""
    rows = []
    for protocol in protocols:
        scored = [
            Scored(one.task, step, score(step.options, step.options[0], protocol))
            for one in trajectories
            for step in one.steps
        ]
        rows += _rows({"protocol": protocol, "method": REPLAY, "budget": 1.0, "screenshots": 0}, scored)
    return rows


def rows_of(
    trajectories: Sequence[Trajectory], answers: Iterable[Answer], protocols: Sequence[str]
) -> list[dict[str, Any]]:
    """Per protocol and cell (in the order of the answers): a row for all tasks, one per task, one per action type.
    Answers to other tasks are passed over.
    """
    steps = {(one.task, step.number): step for one in trajectories for step in one.steps}
    cells: dict[Cell, list[Answer]] = defaultdict(list)
    for answer in answers:
        if (answer.task, answer.step) in steps:
            cells[Cell(answer.method, answer.budget, answer.screenshots)].append(answer)
    rows = []
    for protocol in protocols:
        first: dict[tuple[str, int], list[Scored]] = {}
        for cell, mine in cells.items():
            about = {"protocol": protocol, "method": cell.method, "budget": budget_figure(cell.budget)}
            scored = [
                Scored(x.task, steps[x.task, x.step], _score(x, steps[x.task, x.step], protocol), x) for x in mine
            ]
            rows += (found := _rows(about | {"screenshots": cell.screenshots}, scored))
            base = first.setdefault((cell.budget, cell.screenshots), scored)
            if base is not scored:
                found[0] |= {"against": base[0].answer.method} | _change(scored, base)
    return rows


def _change(mine: Sequence[Scored], theirs: Sequence[Scored]) -> dict[str, float]:
    """What a cell gains on another, step by step."""
    known = {(one.task, one.step.number): one.score.value for one in theirs}
    of_task: dict[str, list[float]] = defaultdict(list)
    for one in mine:
        if (one.task, one.step.number) in known:
            of_task[one.task].append(one.score.value - known[one.task, one.step.number])
    return dict(zip(("change", "change_low", "change_high"), clustered(list(of_task.values()), -1.0), strict=True))


def budget_figure(text: str) -> float | str:
    """A share as a number, tokens as "512t"."""
    budget = Budget.parse(text)
    return str(budget) if budget.fraction is None else budget.fraction


def _score(answer: Answer, step: Step, protocol: str) -> Score:
    atoms = answer.atoms()
    # The released script has quirks of its own with this grammar, and with no other.
    if protocol == "gui_kv" and answer.grammar == TARS:
        atoms = as_released(atoms)
    return score(step.options, atoms, protocol)


def _rows(about: dict[str, Any], scored: Sequence[Scored]) -> list[dict[str, Any]]:
    tasks: dict[str, list[Scored]] = defaultdict(list)
    for one in scored:
        tasks[one.task].append(one)
    rows = [about | {"task": ALL, "type": ALL} | _accuracy(tasks.values()) | _costs(scored)]
    rows += [about | {"task": task, "type": ALL} | _accuracy([part]) | _costs(part) for task, part in tasks.items()]
    for kind in dict.fromkeys(kind for one in scored for kind in one.score.types):
        of_task = [[x.score.types[kind] for x in part if kind in x.score.types] for part in tasks.values()]
        mean, low, high = clustered(of_task)
        count = sum(map(len, of_task))
        rows.append(about | {"task": ALL, "type": kind, "accuracy": mean, "n": count, "low": low, "high": high})
    return rows


def _accuracy(tasks: Iterable[Sequence[Scored]]) -> dict[str, Any]:
    tasks = list(tasks)
    mean, low, high = clustered([[x.score.value for x in part] for part in tasks])
    able = [x.score.value for part in tasks for x in part if scorable(x.step.options[0])]
    n = sum(map(len, tasks))
    found = {"accuracy": mean, "n": n, "low": low, "high": high}
    return found | {"accuracy_scorable": fmean(able) if able else 0.0, "unscorable": n - len(able)}


def _costs(scored: Sequence[Scored]) -> dict[str, Any]:
    """Means of the figures of all steps that have some, and how many replies were no good."""
    answers = [x.answer for x in scored if x.answer is not None]
    figures = [x.figures for x in answers if x.figures]
    if not answers:
        return {}
    found: dict[str, Any] = {name: fmean(x[name] for x in figures) for name in (figures[0] if figures else ())}
    if figures:
        found["kv_bytes_peak"] = max(x["kv_bytes_peak"] for x in figures)
        found["kv_share"] = found["kv_bytes"] / found["kv_bytes_full"]
        found["seconds"] = found["seconds_prefill"] + found["seconds_decode"]
    refused = sum(x.error.startswith(REFUSED) for x in answers)
    return found | {"unreadable": sum(bool(x.error) for x in answers) - refused, "refused": refused}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line per cell over all tasks: accuracy with its interval, then what a step cost."""
    made = Table("protocol", "method", title="step accuracy", box=SIMPLE_HEAD, title_justify="left")
    for name in ("budget", "screens", "accuracy (95 %)", "n", *COSTS):
        made.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row["type"] == row["task"] == ALL:
            made.add_row(row["protocol"], row["method"], *_cells(row))
    return made


def _cells(row: dict[str, Any]) -> list[str]:
    told = [
        str(row["budget"]), str(row["screenshots"] or "-"),
        f"{row['accuracy']:.3f} ({row['low']:.2f}-{row['high']:.2f})", str(row["n"]),
    ]  # fmt: skip
    if "kv_bytes" not in row:
        return [*told, *["-" for _ in COSTS]]
    return [
        *told, f"{row['prefill_tokens']:.0f}", format_bytes(row["kv_bytes"]), f"{row['kv_share']:.1%}",
        f"{row['seconds_prefill']:.3f}", f"{row['seconds_decode']:.3f}",
    ]  # fmt: skip


def type_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Accuracy per cell (down) and action type (across), with the number of steps that ask for it."""
    cells: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for row in rows:
        if row["type"] != ALL:
            cell = row["protocol"], row["method"], str(row["budget"]), str(row["screenshots"] or "-")
            cells[cell][row["type"]] = f"{row['accuracy']:.2f} ({row['n']})"
    kinds = dict.fromkeys(kind for found in cells.values() for kind in found)
    made = Table("protocol", "method", "budget", "screens", *kinds, title="accuracy per action type (steps)")
    made.box, made.title_justify = SIMPLE_HEAD, "left"
    for cell, found in cells.items():
        made.add_row(*cell, *(found.get(kind, "-") for kind in kinds))
    return made


def draw(rows: Sequence[dict[str, Any]], path: Path) -> list[Path]:
    """Accuracy against bytes, one picture per protocol beside `path`, one panel per number of screenshots."""
    mine = [row for row in rows if row["task"] == ALL and row["type"] == ALL and "kv_share" in row]
    pages = []
    for protocol in dict.fromkeys(row["protocol"] for row in mine):
        part = [row | {"task": str(row["screenshots"])} for row in mine if row["protocol"] == protocol]
        counts = sorted({row["screenshots"] for row in part})
        groups = [(str(n), f"{n} screenshot{'s' * (n > 1)} in a prompt, {protocol}") for n in counts]
        pages.append(path.with_name(f"{path.stem}-{protocol}.png"))
        draw_curve(part, pages[-1], groups, "accuracy", "eval.agentnetbench")
    return pages
