"""A small shop on the loopback interface, to try an agent on a site of several pages: `python -m envs.shop`.

Catalogue with a search box, a page per thing, a basket, a checkout form. The server remembers the orders it was sent,
so that a goal can be checked against what was really ordered.
"""

from __future__ import annotations

import argparse
import html
import sys
import threading
from collections.abc import Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from textkv.command import port, run
from textkv.records import listed, parse

FOLDER = Path(str(files("agentkv.envs"))) / "pages" / "shop"
MAX_FORM = 10_000  # bytes


class Shop(ThreadingHTTPServer):
    """Serves until closed; a context manager. `orders` holds what was ordered: name, street, delivery, lines."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), partial(_Counter, directory=str(FOLDER)))
        self.orders: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        """The address of the first page."""
        return f"http://127.0.0.1:{self.server_port}/index.html"

    def __enter__(self) -> Shop:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.server_close()


class _Counter(SimpleHTTPRequestHandler):
    """Takes the orders; everything else is a file of the folder."""

    server: Shop

    def do_POST(self) -> None:
        """Takes an order and answers with the page of thanks; anything else is 400."""
        order = _order(self.rfile.read(min(int(self.headers.get("Content-Length", 0)), MAX_FORM)))
        if self.path != "/order" or order is None:
            self.send_error(400, "this is no order")
            return
        self.server.orders.append(order)
        body = _thanks(order).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Says nothing: the terminal belongs to the agent."""


def _order(form: bytes) -> dict[str, Any] | None:
    fields = {name: values[0] for name, values in parse_qs(form.decode("utf-8", "replace")).items()}
    try:
        basket = listed(parse(fields["basket"]), dict, "basket")
        lines = [(int(line["count"]), str(line["id"]), str(line["colour"])) for line in basket]
        person = {name: fields[name] for name in ("name", "street", "delivery")}
    except (KeyError, TypeError, ValueError):
        return None
    return person | {"lines": lines} if lines else None


def _thanks(order: dict[str, Any]) -> str:
    lines = ", ".join(f"{count} x {thing} ({colour})" for count, thing, colour in order["lines"])
    said = html.escape(f"Order placed: {lines} for {order['name']}, {order['street']}, {order['delivery']}.")
    style = '<link rel="stylesheet" href="shop.css">'
    return f"<!doctype html><meta charset=utf-8><title>Thank you</title>{style}<main><h2>Thank you</h2><p>{said}</main>"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m envs.shop", description=__doc__.split("\n\n")[0])
    p.add_argument("--port", type=port, default=8123, help="port to listen on (8123)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("envs.shop", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Serve until Ctrl-C."""
    with Shop(args.port) as shop:
        print(f"the shop is open at {shop.url} (Ctrl-C closes it)", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    sys.exit(main())
