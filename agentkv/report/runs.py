"""`python -m agentkv.report.runs DIR`: DIR/runs.html, a page that lists the runs below a folder.

A run is a folder with a run.json. Its line tells what was asked, what every method came to, and links to its own page
where that is drawn. The page loads nothing and has no script; what a run says of itself is text.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from agentkv.stats import summarise
from agentkv.tables import format_bytes
from agentkv.trace import RUN, read_run

NAME = "runs.html"
HEADS = ("Run", "Model", "Method", "Budget", "Success (95 %)", "Episodes", "Steps", "KV at rest", "Of full", "s a step")


class _Page(Template):
    delimiter = "@@"


def write_list(folder: Path) -> Path:
    """Writes the list of the runs in `folder` and below, newest first, and returns its path.

    Raises ValueError when there is none.
    """
    found = sorted(folder.rglob(RUN), key=lambda path: (-path.stat().st_mtime, str(path)))
    # A run may hold another's folder by name only: what is read lies below the folder, links aside.
    runs = [path.parent for path in found if path.resolve().is_relative_to(folder.resolve())]
    if not runs:
        raise ValueError(f"{folder} holds no run: no {RUN} in it or below")
    here = resources.files("agentkv.report")
    html = _Page(here.joinpath("runs.html").read_text()).substitute(
        CSS=here.joinpath("page.css").read_text(),
        COUNT=str(len(runs)),
        HEADS="".join(f'<th scope="col">{escape(head)}</th>' for head in HEADS),
        BODY="\n".join(line for run in runs for line in _lines(run, folder)),
    )
    path = folder / NAME
    path.write_text(html)
    return path


def _lines(run: Path, folder: Path) -> Iterator[str]:
    """A table row for each method of a run; one that says why, where it cannot be read."""
    name, page = run.relative_to(folder).as_posix(), run / "report.html"
    title = escape(name if name != "." else run.resolve().name)
    if page.is_file():
        title = f'<a href="{escape(quote(page.relative_to(folder).as_posix()))}">{title}</a>'
    try:
        about, episodes = read_run(run)
        rows = [row for row in summarise(episodes) if row["task"] == "all"]
        if not rows:
            raise ValueError("no episode is finished")
        for row in rows:
            yield _row([title, *map(escape, _cells(about, row))])
            title = ""
    except (ValueError, KeyError, TypeError, OSError) as error:
        yield f'<tr><td>{title}</td><td colspan="{len(HEADS) - 1}">{escape(str(error))}</td></tr>'


def _cells(about: dict[str, Any], row: dict[str, Any]) -> list[str]:
    share = f"{row['kv_share']:.0%}" if row["kv_bytes_full"] else "-"
    return [
        str(about["model"]), str(row["method"]), str(row["budget"]),
        f"{row['success']:.0%} ({row['low']:.0%}-{row['high']:.0%})", str(row["n"]), f"{row['steps']:.1f}",
        format_bytes(row["kv_bytes"]), share, f"{row['seconds']:.2f}",
    ]  # fmt: skip


def _row(cells: list[str]) -> str:
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m agentkv.report.runs DIR   (DIR holds the --out folders of runs)")
    try:
        print(write_list(Path(sys.argv[1])))
    except ValueError as error:
        print(f"agentkv: {error}", file=sys.stderr)
        sys.exit(2)
