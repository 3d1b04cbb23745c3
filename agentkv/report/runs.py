"""`python -m agentkv.report.runs DIR`: DIR/runs.html, a page that lists the runs below a folder.

A run is a folder with a run.json. Its line tells what was asked, what every method came to, and links to its own page
where that is drawn. The page loads nothing and has no script; what a run says of itself is text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from agentkv.reading import read_run
from agentkv.stats import summarise
from agentkv.tables import format_bytes
from agentkv.trace import RUN
from textkv.command import output_file, readable_folder, run, write_text

MODULE = "agentkv.report.runs"
NAME = "runs.html"
HEADS = ("Run", "Model", "Method", "Budget", "Success (95 %)", "Episodes", "Steps", "KV at rest", "Of full", "s a step")


class _Page(Template):
    delimiter = "@@"


def write_list(folder: Path) -> Path:
    """Writes the list of the runs in `folder` and below, newest first, and returns its path.

    Raises ValueError when there is none, or when a file of that name is not this command's.
    """
    path = output_file(_is_ours, MODULE)(str(folder / NAME))
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
        BODY="\n".join(line for place in runs for line in _lines(place, folder)),
    )
    write_text(path, html)
    return path


def _is_ours(path: Path) -> bool:
    """Whether a page is a list of runs."""
    return f'<meta name="generator" content="{MODULE}">' in path.read_text(encoding="utf-8", errors="replace")


def _lines(place: Path, folder: Path) -> Iterator[str]:
    """A table row for each method of a run; one that says why, where it cannot be read."""
    name, page = place.relative_to(folder).as_posix(), place / "report.html"
    title = escape(name if name != "." else place.resolve().name)
    if page.is_file():
        title = f'<a href="{escape(quote(page.relative_to(folder).as_posix()))}">{title}</a>'
    try:
        found = read_run(place)
        rows = [row for row in summarise(found.episodes) if row["task"] == "all"]
        if not rows:
            raise ValueError("no episode is finished")
        for row in rows:
            yield _row([title, *map(escape, _cells(found.about, row))])
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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.split("\n\n")[0])
    p.add_argument("folder", type=readable_folder, metavar="DIR", help="it holds the --out folders of runs")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run(MODULE, parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Write the page."""
    print(write_list(args.folder))


if __name__ == "__main__":
    sys.exit(main())
