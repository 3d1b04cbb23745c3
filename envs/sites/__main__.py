"""`python -m envs.sites install`, `list` and `serve`: the pages of the site tasks, fetched from npm's registry."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from textkv.command import port, run

from .packages import PACKAGES, SitesMissing, install
from .server import SiteServer
from .templates import DASHBOARD, OFFICE, Template

TEMPLATES = {template.package.name: template for template in (OFFICE, DASHBOARD)}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m envs.sites", description=__doc__.split("\n\n")[0])
    command = p.add_subparsers(required=True, dest="command", metavar="command")
    command.add_parser("install", help="fetch what is missing, and compare the checksums of what is there")
    command.add_parser("list", help="the packages, and where they lie")
    serve = command.add_parser("serve", help="serve a package's pages on the loopback interface until Ctrl-C")
    serve.add_argument("name", choices=list(TEMPLATES))
    serve.add_argument("--port", type=port, default=8124)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("envs.sites", parser(), work, argv, explained=(SitesMissing,))


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """List, install or serve."""
    if args.command == "serve":
        _serve(TEMPLATES[args.name], args.port)
        return
    for package in PACKAGES:
        about = f"{package.name} {package.version} ({package.licence}, {package.megabytes:g} MB)"
        if args.command == "install":
            print(f"{about}: {install(package)}")
        else:
            print(f"{about}: {package.path if package.installed else 'python -m envs.sites install'}")


def _serve(template: Template, port: int) -> None:
    with SiteServer(template, port) as server:
        print(f"{template.package.name} is at {server.address('index.html')} (Ctrl-C closes it)", flush=True)
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
