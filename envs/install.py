"""`python -m envs.install`: makes sure that a Chromium is there, and says which one it is.

Looks first; only if there is none does it install one: Debian's package where apt-get may be used, else Playwright's
own download. Neither is tried when `AGENTKV_CHROMIUM` names a browser.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from textkv.command import ran, run

from .browser import ChromiumMissing, find_chromium
from .driver import driver


def ways() -> list[list[list[str]]]:
    """The ways to install a Chromium on this machine, best first; each is a list of commands."""
    found = []
    apt = shutil.which("apt-get")
    if apt:
        sudo = [] if os.geteuid() == 0 else ["sudo", "--non-interactive"]
        if not sudo or shutil.which("sudo"):
            install = [apt, "install", "--yes", "--no-install-recommends", "chromium"]
            found.append([[*sudo, apt, "update"], [*sudo, *install]])
    found.append([[sys.executable, "-m", "playwright", "install", "chromium"]])
    return found


def look() -> Path | None:
    """The Chromium that the environments would use, or None."""
    with driver() as playwright:
        try:
            return find_chromium(playwright=playwright)
        except ChromiumMissing:
            if os.environ.get("AGENTKV_CHROMIUM"):
                raise
            return None


def parser() -> argparse.ArgumentParser:
    """The command line: there is nothing to say."""
    return argparse.ArgumentParser(prog="python -m envs.install", description=__doc__.split("\n\n")[0])


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("envs.install", parser(), work, argv, explained=(ChromiumMissing,))


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Find, or install."""
    path = look()
    for way in ways() if path is None else []:
        print(f"no Chromium found; trying: {' '.join(way[-1])}", file=sys.stderr)
        if all(ran(command)[0] == 0 for command in way):
            path = look()
            if path is not None:
                break
    if path is None:
        raise ChromiumMissing("no Chromium could be installed")
    print(f"Chromium: {path}")


if __name__ == "__main__":
    sys.exit(main())
