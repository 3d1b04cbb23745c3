"""The score of one step, 0 to 1: what was predicted against what would have been right.

v1 is the evaluator of OpenCUA's published figures, v2 its later form (keys in order, amounts of scrolling, too many
actions). gui_kv is the script of arXiv 2510.00536, which compares first actions only; figures made with it stand beside
that paper's and no others. Nothing is changed in place: upstream appends a newline to its ground truth at every call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import dist, exp, sqrt

from .atoms import POINTED, Atom

PROTOCOLS = ("v1", "v2", "gui_kv")
THETA = 0.01 * sqrt(2)  # a point this far from the recorded one still counts fully
DECAY = 120.0
ALIKE = 0.8  # a text this similar counts fully
SCORED = ("click", "doubleclick", "rightclick", "tripleclick", "moveto", "dragto", "write", "press", "hotkey", "scroll")
"""Types that have a rule besides terminate; a right hscroll, middleClick or wait earns nothing."""

Option = Sequence[Atom]


@dataclass(frozen=True)
class Score:
    """`value` of the step; `types`: the mean per action type of the option that earned it."""

    value: float = 0.0
    types: dict[str, float] = field(default_factory=dict)


def scorable(option: Option) -> bool:
    """Whether doing exactly this earns 1: some action of it has a rule."""
    return bool(option) and (option[0].type == "terminate" or any(atom.type in SCORED for atom in option))


def score(options: Sequence[Option], predicted: Option, protocol: str) -> Score:
    """The best score that `predicted` gets from `options`: the ground truth, then its alternatives.

    Raises ValueError for an unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is unknown; use {', '.join(PROTOCOLS)}")
    if protocol == "gui_kv":
        return _first_actions(options, predicted)
    best = _whole(options[0], predicted, protocol == "v2")
    for option in options[1:]:
        if best.value >= 1:
            break
        best = max(best, _whole(option, predicted, protocol == "v2"), key=lambda one: one.value)
    return best


def _whole(truth: Option, predicted: Option, later: bool) -> Score:
    """All actions in order, the mean over the types of the ground truth; `later`: by the rules of v2."""
    if not truth or not predicted:
        return Score(0.0, {atom.type: 0.0 for atom in truth})
    truth, predicted = _merged(truth, ("press", "hotkey")), _merged(predicted, ("press",))
    factor = len(truth) / len(predicted) if later and len(predicted) > len(truth) else 1.0
    if truth[0].type == "terminate":
        right = predicted[0].type == "terminate" and predicted[0].status == truth[0].status
        return Score(right * factor, {"terminate": right * factor})
    if predicted[0].type not in {atom.type for atom in truth}:
        return Score(0.0, {atom.type: 0.0 for atom in truth})
    earned: dict[str, list[float]] = defaultdict(list)
    counts: dict[str, int] = defaultdict(int)
    for number, wanted in enumerate(truth):
        counts[wanted.type] += 1
        said = predicted[number] if number < len(predicted) else None
        value = 0.0 if said is None or said.type != wanted.type else atomic(wanted, said, later)
        if value is not None:  # types without a rule count only where they are missed, as upstream
            earned[wanted.type].append(value)
    types = {kind: factor * sum(values) / counts[kind] for kind, values in earned.items()}
    return Score(sum(types.values()) / len(types) if types else 0.0, types)


def _merged(atoms: Option, by: tuple[str, ...]) -> list[Atom]:
    """A write and the Enter after it, pressed by one of the types `by`, are one write that ends a line."""
    merged: list[Atom] = []
    rest = list(reversed(atoms))
    while rest:
        atom = rest.pop()
        if atom.type == "write" and rest and rest[-1].type in by and rest[-1].keys == ("enter",):
            rest.pop()
            atom = replace(atom, text=atom.text + "\n")
        merged.append(atom)
    return merged


def _first_actions(options: Sequence[Option], predicted: Option) -> Score:
    """GUI-KV's comparison of first actions; an alternative stands in where its type fits, or where all else is 0."""
    firsts = [option[0] for option in options if option]
    if not firsts or not predicted:
        return Score(0.0, {atom.type: 0.0 for atom in firsts[:1]})
    said = predicted[0]
    wanted = next((atom for atom in firsts if atom.type == said.type), firsts[0])
    value = _alike(wanted, said)
    if value == 0:
        value, wanted = max(((_alike(atom, said), atom) for atom in firsts), key=lambda pair: pair[0])
    return Score(value, {wanted.type: value})


def _alike(wanted: Atom, said: Atom) -> float:
    if wanted.type != said.type:
        return 0.0
    if wanted.type == "terminate":
        return float(wanted.status == said.status)
    return atomic(wanted, said) or 0.0


def atomic(wanted: Atom, said: Atom, later: bool = False) -> float | None:
    """The score of one action of the right type; None where its type has no rule."""
    if wanted.type not in SCORED:
        return None
    if wanted.type in POINTED:
        return place_score(wanted, said)
    if wanted.type == "write":
        return text_score(wanted.text, said.text)
    if wanted.type == "scroll":
        return scroll_score(wanted, said) if later else 1.0
    return float(wanted.keys == said.keys if later else set(wanted.keys) == set(said.keys))


def place_score(wanted: Atom, said: Atom) -> float:
    """1 inside any box (edges included), else by the distance to the recorded point in shares of the sides."""
    if wanted.point is None or said.point is None:
        return 0.0
    x, y = said.point
    if any(left <= x <= left + width and top <= y <= top + height for left, top, width, height in wanted.boxes):
        return 1.0
    distance = dist(said.point, wanted.point)
    return 1.0 if distance <= THETA else exp(-DECAY * (distance - THETA))


def text_score(wanted: str, said: str) -> float:
    """By edit distance, letters of either case alike, blanks and newlines at the ends ignored."""
    wanted, said = wanted.lower().strip(), said.lower().strip()
    longest = max(len(wanted), len(said))
    similarity = 1.0 if longest == 0 else 1.0 - edit_distance(wanted, said) / longest
    return 1.0 if similarity >= ALIKE else similarity / ALIKE


def scroll_score(wanted: Atom, said: Atom) -> float:
    """v2: nothing for another direction, else the smaller amount over the larger."""
    if wanted.direction and wanted.direction != said.direction:
        return 0.0
    if wanted.amount is None or said.amount is None:
        return float(wanted.direction == said.direction)
    small, large = sorted((abs(wanted.amount), abs(said.amount)))
    return 1.0 if large == 0 else small / large


def edit_distance(left: str, right: str) -> int:
    """Levenshtein: insertions, deletions and substitutions that make one text of the other."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]
