"""`python -m agentkv.report.picture RUN PICTURE [TASK/SEED/STEP]`: a PNG of a run's page, 1400 pixels wide.

The picture ends below the frames that were kept; its colours are reduced to a palette, which flat pages do not show.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from agentkv.envs.boundary import NOWHERE
from agentkv.envs.browser import ChromiumMissing, find_chromium
from agentkv.envs.driver import driver
from agentkv.report import write_report
from textkv.command import readable_folder, results_file, run, some_text, write_bytes

MODULE = "agentkv.report.picture"
WIDTH, COLOURS, MARGIN = 1400, 160, 20


def take(run: Path, picture: Path, place: str = "") -> None:
    """Draw RUN/report.html and save what it shows at `place` ("task/seed/step"). Raises ValueError, ChromiumMissing."""
    address = f"{write_report(run).resolve().as_uri()}#{place}"
    with driver() as playwright:
        found = find_chromium(playwright=playwright)
        browser = playwright.chromium.launch(
            executable_path=found, proxy={"server": NOWHERE}
        )  # a page that asks nobody
        page = browser.new_page(
            viewport={"width": WIDTH, "height": 1000}, color_scheme="light", reduced_motion="reduce"
        )
        page.goto(address, timeout=120_000)
        held = page.locator(".panel:has(.held)")
        end = (held if held.count() else page.locator("#player")).bounding_box()
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": end["y"] + end["height"] + MARGIN}
        png = page.screenshot(full_page=True, clip=clip)
        browser.close()
    drawn, mark = io.BytesIO(), PngInfo()
    mark.add_text("Software", f"python -m {MODULE}")  # by which the command knows its own pictures again
    Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS).save(drawn, "PNG", optimize=True, pnginfo=mark)
    write_bytes(picture, drawn.getvalue())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m agentkv.report.picture", description=__doc__.split("\n\n")[0])
    p.add_argument("run", type=readable_folder, metavar="RUN", help="the --out folder of a run")
    p.add_argument("picture", type=results_file(MODULE), metavar="PICTURE.png", help="the picture to write")
    p.add_argument(
        "place", type=some_text, nargs="?", metavar="TASK/SEED/STEP", help="what it shows (the first episode)"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run(MODULE, parser(), work, argv, explained=(ChromiumMissing,))


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Draw."""
    take(args.run, args.picture, args.place or "")


if __name__ == "__main__":
    sys.exit(main())
