"""`python -m agentkv.report RUN`: draw the page of a run again from its traces."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from agentkv.report import write_report
from textkv.command import readable_folder, run


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m agentkv.report", description=__doc__)
    p.add_argument("run", type=readable_folder, metavar="RUN", help="the --out folder of a run")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("agentkv.report", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Draw, and say where."""
    print(write_report(args.run))


if __name__ == "__main__":
    sys.exit(main())
