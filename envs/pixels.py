"""`python -m envs.pixels`: draws 20 fixed screens and says which have the pixels they had when they were recorded.

A screen that differs is a failure (exit code 1) only under the Chromium and on the kind of machine that recorded it;
another version may smooth edges otherwise, so there it is only reported. `--write` records what is drawn now.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from textkv.command import run, write_text
from textkv.records import read

from . import catalogue
from .browser import Browser, ChromiumMissing
from .live import LiveTask
from .miniwob import MiniwobMissing
from .shop import Shop
from .web import WebEnv

RECORD = Path(str(files("agentkv.envs"))) / "pixels.json"
SEED = 1
MEMORY = ("memory-code", "memory-colour", "memory-place", "memory-order")
MINIWOB = (
    "click-tab",
    "click-dialog",
    "click-collapsible",
    "click-option",
    "click-shape",
    "count-shape",
    "login-user",
    "enter-text",
    "choose-list",
    "use-spinner",
)
SHOP = ("index.html", "item.html?id=lamp", "basket.html", "checkout.html")
OWN = ("controls", "letters")
_PAGES = Path(str(files("agentkv.envs"))) / "pages"
_SCREEN = (320, 320)


def names() -> list[str]:
    """The screens: tasks by their names, pages of the shop, two pages of native controls and of fonts' names."""
    return [*MEMORY, *MINIWOB, *(f"shop/{page}" for page in SHOP), *OWN]


def draw(browser: Browser, chosen: Sequence[str]) -> dict[str, np.ndarray]:
    """The screens by name, uint8 [height, width, 3]."""
    with Shop() as shop:
        return {name: _draw(browser, name, shop) for name in chosen}


def _draw(browser: Browser, name: str, shop: Shop) -> np.ndarray:
    if name in MEMORY + MINIWOB:
        env = catalogue.make(name, browser)
    else:
        own = (_PAGES / f"{name}.html").resolve().as_uri()
        address = shop.url.replace("index.html", name.removeprefix("shop/")) if name.startswith("shop/") else own
        env = WebEnv(LiveTask(address, "look", viewport=_SCREEN), browser)
    try:
        return env.reset(seed=SEED)[0]["screenshot"]
    finally:
        env.close()


def record(screens: Mapping[str, np.ndarray], chromium: str) -> dict[str, Any]:
    """What is stored: who drew, and the SHA-256 of every screen's size and pixels."""
    hashes = {
        name: hashlib.sha256(str(shot.shape).encode() + shot.tobytes()).hexdigest() for name, shot in screens.items()
    }
    return {"chromium": chromium, "machine": f"{platform.system()} {platform.machine()}", "screens": hashes}


def compare(now: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, str]:
    """By screen: "same", "different", "not recorded", or "other Chromium" and "other machine" for a difference that
    these may explain.
    """
    if now["chromium"] != then["chromium"]:
        unlike = "other Chromium"
    else:
        unlike = "different" if now["machine"] == then["machine"] else "other machine"
    recorded = then["screens"]
    return {
        name: "not recorded" if name not in recorded else "same" if found == recorded[name] else unlike
        for name, found in now["screens"].items()
    }


def table(now: Mapping[str, Any], verdicts: Mapping[str, str]) -> Table:
    """Screens, the start of their hashes, verdicts."""
    made = Table("screen", "hash", "is")
    for name, verdict in verdicts.items():
        made.add_row(name, now["screens"][name][:16], verdict)
    return made


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m envs.pixels", description=__doc__.split("\n\n")[0])
    p.add_argument("--write", action="store_true", help="record what is drawn now")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 1 when a screen differs, else as `textkv.command.run` says."""
    return run("envs.pixels", parser(), work, argv, explained=(ChromiumMissing, MiniwobMissing))


def work(args: argparse.Namespace, argv: list[str]) -> int:
    """Draw, compare and print; 1 when a screen differs."""
    with Browser() as browser:
        now = record(draw(browser, names()), browser.version)
    if args.write:
        write_text(RECORD, json.dumps(now, indent=2) + "\n")
    then = read(RECORD)
    verdicts = compare(now, then)
    Console().print(table(now, verdicts))
    same = sum(verdict == "same" for verdict in verdicts.values())
    print(f"{same} of {len(verdicts)} screens are the same; drawn by Chromium {now['chromium']} on {now['machine']}")
    if {"other Chromium", "other machine"} & set(verdicts.values()):
        print(f"recorded by Chromium {then['chromium']} on {then['machine']}: its edges may be smoothed otherwise")
    return 1 if {"different", "not recorded"} & set(verdicts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
