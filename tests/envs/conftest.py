"""A browser for the whole run, and small web servers on the loopback interface."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from agentkv.envs.browser import Browser, ChromiumMissing

SEEDS = int(os.environ.get("ENV_SEEDS", "1"))


class Site(ThreadingHTTPServer):
    """Serves `pages`: path -> (status, headers, body); `hits` are the paths that were asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        self.pages: dict[str, tuple[int, dict[str, str], str]] = {}
        self.hits: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def page(self, body: str, path: str = "/") -> str:
        self.pages[path] = (200, {"Content-Type": "text/html; charset=utf-8"}, body)
        return self.url + path


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.hits.append(self.path)
        status, headers, body = self.server.pages.get(self.path, (404, {}, ""))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    try:
        running = Browser().start()
    except ChromiumMissing as error:
        pytest.skip(f"no Chromium: {error}")
    yield running
    running.close()


def _serve() -> Iterator[Site]:
    site = Site()
    yield site
    site.shutdown()
    site.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    yield from _serve()


@pytest.fixture
def elsewhere() -> Iterator[Site]:
    """A second origin, which no task may reach."""
    yield from _serve()
