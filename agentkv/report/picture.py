"""`python -m agentkv.report.picture RUN PICTURE [TASK/SEED/STEP]`: a PNG of a run's page, 1400 pixels wide.

The picture ends below the frames that were kept; its colours are reduced to a palette, which flat pages do not show.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from agentkv.envs.browser import ChromiumMissing, find_chromium
from agentkv.report import write_report

WIDTH, COLOURS, MARGIN = 1400, 160, 20


def take(run: Path, picture: Path, place: str = "") -> None:
    """Draw RUN/report.html and save what it shows at `place` ("task/seed/step"). Raises ValueError, ChromiumMissing."""
    address = f"{write_report(run).resolve().as_uri()}#{place}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(playwright=playwright))
        page = browser.new_page(
            viewport={"width": WIDTH, "height": 1000}, color_scheme="light", reduced_motion="reduce"
        )
        page.goto(address, timeout=120_000)
        held = page.locator(".panel:has(.held)")
        end = (held if held.count() else page.locator("#player")).bounding_box()
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": end["y"] + end["height"] + MARGIN}
        png = page.screenshot(full_page=True, clip=clip)
        browser.close()
    picture.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS).save(picture, optimize=True)


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 4:
        sys.exit("usage: python -m agentkv.report.picture RUN PICTURE.png [TASK/SEED/STEP]")
    try:
        take(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
    except (ValueError, ChromiumMissing) as error:
        print(f"agentkv: {error}", file=sys.stderr)
        sys.exit(2)
