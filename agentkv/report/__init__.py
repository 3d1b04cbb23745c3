"""One self-contained page about a run: what each method did, and which visual tokens it still held when it did it.

The parts of the page (STYLES, SCRIPTS) are put into one file with the data beside them: pictures are data: URIs, the
page's own policy forbids every request, and whatever a model or a web page said is data that the script writes as
text, never as markup. The size is bounded: what did not fit is counted on the page.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from agentkv.reading import Recorded, open_picture, read_picture, read_run
from agentkv.stats import summarise
from textkv.command import write_text

STYLES = ("page.css", "episode.css")
SCRIPTS = ("base.js", "summary.js", "pictures.js", "cards.js", "panels.js", "compare.js", "page.js")  # in this order
MAX_BYTES = 12_000_000  # of the page: opens at once, can be mailed
MAX_STEPS = 60  # shown per episode
SMALL_PNG = 24_000  # bytes up to which a screenshot is embedded untouched
MAX_WIDTH = 960  # pixels of a larger one, which becomes a JPEG


class _Page(Template):
    """`@@NAME` is a place to fill: `$` and `{}` belong to JavaScript."""

    delimiter = "@@"


class _Images:
    """Every picture once, as data: URIs in the order of first use."""

    def __init__(self) -> None:
        self.uris: list[str] = []
        self._index: dict[str, int] = {}

    def add(self, folder: Path, name: str) -> int:
        """Index of the picture of that name in an episode's folder. Raises ValueError for what is no whole PNG."""
        raw = read_picture(folder, name)
        key = hashlib.sha256(raw).hexdigest()
        if key not in self._index:
            self._index[key] = len(self.uris)
            self.uris.append(_data_uri(raw))
        return self._index[key]

    def size(self) -> int:
        """Characters of all URIs together."""
        return sum(map(len, self.uris))


def _data_uri(png: bytes) -> str:
    kind, image = "png", open_picture(png)
    if len(png) > SMALL_PNG:
        image.thumbnail((MAX_WIDTH, MAX_WIDTH * 4))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=82, optimize=True)
        kind, png = "jpeg", out.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(png).decode()}"


def write_report(run: Path, notes: Sequence[str] = (), max_bytes: int = MAX_BYTES) -> Path:
    """Write RUN/report.html from the traces in `run` and return its path.

    `notes` are footnotes of the table. Episodes are left out, and counted on the page, once it nears `max_bytes`.
    Raises ValueError when `run` holds no run.
    """
    recorded = read_run(run)
    about = recorded.about
    data = _page_data(recorded, [*(notes or about["notes"]), *recorded.damaged], max_bytes)
    here = resources.files(__name__)
    title = f"agentkv: {', '.join(about['methods'])} at budget {about['budget']}"
    html = _Page(here.joinpath("page.html").read_text()).substitute(
        TITLE=escape(title),
        CSS="\n".join(here.joinpath(name).read_text() for name in STYLES),
        JS="\n".join(here.joinpath(name).read_text() for name in SCRIPTS),
        # "<" as an escape: no text of a model or a page can close the script element.
        DATA=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )
    path = run / "report.html"
    write_text(path, html)
    return path


def _page_data(recorded: Recorded, notes: list[str], max_bytes: int) -> dict[str, Any]:
    about, episodes = recorded.about, recorded.episodes
    images, shown, used = _Images(), [], 0
    pairs = _pairs(episodes)
    for pair in _telling_first(pairs):
        try:
            entry = _pair_data(pair, images)
        except ValueError as error:
            notes.append(f"{pair[0]['task']} {pair[0]['seed']} is not shown: {error}")
            continue
        used += len(json.dumps(entry))
        if shown and used + images.size() > max_bytes:
            break
        shown.append(entry)
    order = {(p[0]["task"], p[0]["seed"]): i for i, p in enumerate(pairs)}
    shown.sort(key=lambda e: order[e["task"], e["seed"]])
    return {
        "about": {k: v for k, v in about.items() if k not in ("seeds", "notes")},
        "rows": summarise(episodes),
        "notes": notes,
        "methods": [m for m in about["methods"] if any(e["method"] == m for e in episodes)],
        "pairs": shown,
        "pairs_played": len(pairs),
        "images": images.uris,
    }


def _pairs(episodes: Iterable[dict]) -> list[list[dict]]:
    """Episodes grouped by (task, seed): the same problem played by every method."""
    groups: dict[tuple[str, int], list[dict]] = {}
    for episode in episodes:
        groups.setdefault((episode["task"], episode["seed"]), []).append(episode)
    return list(groups.values())


def _telling_first(pairs: Sequence[list[dict]]) -> list[list[dict]]:
    """All tasks in turn, within a task first those on which the methods differ: what to keep when space is short."""
    by_task: dict[str, list[list[dict]]] = {}
    for pair in sorted(pairs, key=lambda p: len({bool(e["success"]) for e in p}), reverse=True):
        by_task.setdefault(pair[0]["task"], []).append(pair)
    longest = max(map(len, by_task.values()), default=0)
    return [group[i] for i in range(longest) for group in by_task.values() if i < len(group)]


def _pair_data(pair: Sequence[dict], images: _Images) -> dict[str, Any]:
    first = pair[0]
    plays = {e["method"]: _play_data(e, images) for e in pair}
    return {"task": first["task"], "seed": first["seed"], "goal": first["goal"], "plays": plays}


def _play_data(episode: dict, images: _Images) -> dict[str, Any]:
    folder, steps = episode["folder"], episode["steps"]
    names = [s["screenshot"] for s in steps]
    shown = [
        {
            **{k: v for k, v in step.items() if k not in ("screenshot", "frames")},
            "image": images.add(folder, step["screenshot"]),
            "frames": [
                {
                    "step": f["step"],
                    "image": images.add(folder, names[f["step"]]),
                    "grid": f["grid"],
                    "kept": base64.b64encode(bytes(f["kept"])).decode(),
                }
                for f in step["frames"]
            ],
        }
        for step in steps[:MAX_STEPS]
    ]
    keys = ("success", "reward", "stop", "crashes")
    return {**{k: episode[k] for k in keys}, "steps": shown, "steps_played": len(steps)}
