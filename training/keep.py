"""A trained model takes the place of the embedded one if it is measured to be better."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from textkv.disk import move_files
from textkv.records import read_fields
from training.export import read_trained

FIGURES = "evaluation.json"
Rows = Sequence[dict[str, Any]]


def recorded(folder: Path) -> float:
    """The score written beside the weights in `folder`, -1 if they were never measured."""
    path = folder / FIGURES
    return float(read_fields(path, {"score": float})["score"]) if path.is_file() else -1.0


def consider(
    latest: Path,
    place: Path,
    measure: Callable[[Path], tuple[float, Rows]],
    readme: Callable[[Rows, dict[str, Any]], str],
) -> float:
    """Measure a copy of `latest` and install it as `place` if its score is higher; returns the score.

    Args:
        measure: the score of a model folder and the rows it follows from.
        readme: README.md of the weights, from the rows and training.json.
    """
    # Beside its destination: a file is replaced atomically only within one file system.
    draft = place.with_name(place.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(latest, draft)
    try:
        score, rows = measure(draft)
        # Strictly better: equal weights would only make the repository grow.
        if score > recorded(place):
            trained = read_trained(draft)
            figures = {"score": score, "rows": list(rows)}
            (draft / FIGURES).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
            (draft / "README.md").write_text(readme(rows, trained), encoding="utf-8")
            move_files(draft, place)
    finally:
        shutil.rmtree(draft)
    return score
