"""`python -m agentkv.report.gif RUN FILE.gif [TASK/SEED]`: an episode as a moving picture, all methods side by side.

Each step shows what every method saw, with a veil over the visual tokens that it had dropped, a cross where it acted,
and what its cache held. Without a place, the first episode on which the methods differ, or else the first.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from agentkv.reading import read_picture, read_run
from agentkv.tables import format_bytes
from textkv.command import output_file, readable_folder, run, some_text, write_bytes

MODULE = "agentkv.report.gif"
WIDTH, CAPTION, GAP = 320, 56, 8  # pixels of one method's picture, of the words above it, and between two
SECONDS, LAST = 1.2, 3.0  # that a step is shown, and the last one
VEIL, INK, PAPER, MARK = (11, 16, 28), (20, 24, 31), (246, 247, 249), (214, 62, 111)
FONTS = "agentkv.envs.fonts"


def write_gif(source: Path, path: Path, place: str = "") -> Path:
    """Draws the episode at `place` ("task/seed") of a run and returns the path.

    Raises:
        ValueError: no run, no such episode, or a picture of it that is not in its folder.
    """
    plays = _plays(read_run(source).episodes, place)
    longest = max(len(play["steps"]) for play in plays)
    pages = [_page(plays, step) for step in range(longest)]
    size = max(page.width for page in pages), max(page.height for page in pages)
    # One size and one palette for all: a GIF has no others.
    whole = [_on(page, size).quantize(128) for page in pages]
    shown = [int(1000 * SECONDS)] * (len(whole) - 1) + [int(1000 * LAST)]
    made = io.BytesIO()
    whole[0].save(made, "GIF", save_all=True, append_images=whole[1:], duration=shown, loop=0, comment=MODULE.encode())
    write_bytes(path, made.getvalue())
    return path


def _is_ours(path: Path) -> bool:
    """Whether a file is a GIF of this command."""
    try:
        with Image.open(path, formats=("GIF",)) as gif:
            return gif.info.get("comment") == MODULE.encode()
    except (OSError, ValueError):
        return False


def _plays(episodes: Sequence[dict[str, Any]], place: str) -> list[dict[str, Any]]:
    """The episodes of one task and seed, one per method."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for episode in episodes:
        if episode["steps"]:
            groups.setdefault(f"{episode['task']}/{episode['seed']}", []).append(episode)
    if not groups:
        raise ValueError("the run has no finished episode with a step")
    if place and place not in groups:
        raise ValueError(f"no finished episode {place}; there are {', '.join(list(groups)[:5])}")
    differing = (name for name, plays in groups.items() if len({bool(x["success"]) for x in plays}) > 1)
    return groups[place or next(differing, next(iter(groups)))]


def _page(plays: Sequence[dict[str, Any]], number: int) -> Image.Image:
    cards = [_card(play, number) for play in plays]
    page = Image.new("RGB", (sum(c.width + GAP for c in cards) - GAP, max(c.height for c in cards)), PAPER)
    left = 0
    for card in cards:
        page.paste(card, (left, 0))
        left += card.width + GAP
    return page


def _card(play: dict[str, Any], number: int) -> Image.Image:
    """One method at one step; after its last step that one stays, with how it ended."""
    step = play["steps"][min(number, len(play["steps"]) - 1)]
    picture = _seen(play, step)
    card = Image.new("RGB", (WIDTH, CAPTION + picture.height), PAPER)
    card.paste(picture, (0, CAPTION))
    pen, ended = ImageDraw.Draw(card), number >= len(play["steps"]) - 1
    how = ("solved" if play["success"] else play["stop"]) if ended else f"step {number + 1}"
    held = f"{format_bytes(step['kv_bytes'])} of {format_bytes(step['kv_bytes_full'])}" if step["kv_bytes_full"] else ""
    for line, (text, bold) in enumerate(((f"{play['method']} · {how}", True), (held, False), (_did(step), False))):
        font = _font(bold)
        while text and pen.textlength(text, font) > WIDTH - 8:
            text = text[:-2].rstrip("…") + "…" if len(text) > 2 else ""
        pen.text((4, 2 + 18 * line), text, INK, font)
    return card


def _seen(play: dict[str, Any], step: dict[str, Any]) -> Image.Image:
    """The screenshot of a step under its veil, with the point of its action."""
    with Image.open(io.BytesIO(read_picture(play["folder"], step["screenshot"]))) as file:
        seen = file.convert("RGB")
    seen = seen.resize((WIDTH, max(1, round(seen.height * WIDTH / seen.width))))
    current = next((frame for frame in step["frames"] if frame["step"] == step["step"]), None)
    if current is not None:
        kept = np.array(current["kept"], np.float32).reshape(current["grid"]) / 100
        dropped = Image.fromarray(np.uint8(220 * (1 - kept))).resize(seen.size, Image.Resampling.NEAREST)
        seen.paste(Image.new("RGB", seen.size, VEIL), (0, 0), dropped)
    action = step["action"] or {}
    at = next((x for x in action.get("actions", [action]) if isinstance(x.get("x"), int | float)), None)
    if at is not None:
        x, y = (value * seen.width / step["viewport"][0] for value in (at["x"], at["y"]))
        pen = ImageDraw.Draw(seen)
        for colour, wide in (((255, 255, 255), 5), (MARK, 2)):
            pen.line((x - 7, y, x + 7, y), colour, wide)
            pen.line((x, y - 7, x, y + 7), colour, wide)
    return seen


def _did(step: dict[str, Any]) -> str:
    """The action in a few words."""
    action = step["action"]
    if action is None:
        return "the answer could not be read"
    values = (v for k, v in action.items() if k not in ("type", "actions") and v not in (None, "", []))
    told = ", ".join(f"{v:.0f}" if isinstance(v, float) else str(v) for v in values)
    return " ".join(f"{action['type']} {told}".split())


def _font(bold: bool) -> ImageFont.FreeTypeFont:
    name = "LiberationSans-Bold.ttf" if bold else "LiberationSans-Regular.ttf"
    with resources.as_file(resources.files(FONTS).joinpath(name)) as path:
        return ImageFont.truetype(str(path), 14)


def _on(page: Image.Image, size: tuple[int, int]) -> Image.Image:
    whole = Image.new("RGB", size, PAPER)
    whole.paste(page, (0, 0))
    return whole


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.split("\n\n")[0])
    p.add_argument("run", type=readable_folder, metavar="RUN", help="the --out folder of a run")
    p.add_argument("gif", type=output_file(_is_ours, MODULE), metavar="FILE.gif", help="the picture to write")
    p.add_argument("place", type=some_text, nargs="?", metavar="TASK/SEED", help="which episode (default: see above)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run(MODULE, parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Draw."""
    print(write_gif(args.run, args.gif, args.place or ""))


if __name__ == "__main__":
    sys.exit(main())
