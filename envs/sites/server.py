"""Serves a package's pages on the loopback interface, with a clock that stands, data of ours and a memory of changes.

Every page gets `pages/site.js` first and the template's own glue (`pages/gentelella.js`, `pages/sb-admin.js`) last;
addresses of other hosts are taken out. A few exact replacements let the templates' scripts work on our data: versions
are pinned by checksum, so a text that is not there once is an error of ours and refused when the server is built.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Mapping
from functools import cache, partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from mimetypes import guess_type
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .packages import files_of
from .templates import Template

FOLDER = Path(str(files("agentkv.envs"))) / "sites" / "pages"
START = "start.html"  # an empty page of the origin, on which an episode is prepared
_FOREIGN = re.compile(rb'<link\b[^>]*href="https://[^"]*"[^>]*>')
_FOREIGN_PICTURE = re.compile(rb'(src=)"https://[^"]*"')
_FOREIGN_URL = re.compile(rb"url\(\"?https://[^)]*\)")
_MAIN = re.compile(
    rb'(<div class="(?:page-wrapper|container-fluid)">).*?(\s*<footer|\s*<!-- /.container-fluid -->)', re.S
)


def content_of(template: Template) -> dict[str, bytes]:
    """Every page and file of a template as it is served, by path. Raises `SitesMissing`, and ValueError for a patch
    whose text is not in its file exactly once.
    """
    found = dict(files_of(template.package))
    for name, old, new in template.patches:
        if found[name].count(old.encode()) != 1:
            raise ValueError(f"{template.package.name}: {name} holds {old!r} {found[name].count(old.encode())} times")
        found[name] = found[name].replace(old.encode(), new.encode())
    for name, frame in template.added:
        found[template.folder + name] = _framed((FOLDER / name).read_bytes(), found[template.folder + frame])
    found[START] = b"<!doctype html><html><head></head><body></body></html>"
    for name, page in found.items():
        if name.endswith(".html"):
            found[name] = _with_scripts(page, template)
        elif name.endswith(".css"):
            found[name] = _FOREIGN_URL.sub(b"none", page)
    for name in ("site.js", template.glue):
        found[f"agentkv/{name}"] = (FOLDER / name).read_bytes()
    return found


def _framed(inner: bytes, frame: bytes) -> bytes:
    """A page of ours: the frame's own, with other content."""
    return _MAIN.sub(lambda match: match[1] + inner + match[2], frame, count=1)


def _with_scripts(page: bytes, template: Template) -> bytes:
    page = _FOREIGN_PICTURE.sub(b'\\1"' + template.picture.encode() + b'"', _FOREIGN.sub(b"", page))
    page = page.replace(b"<head>", b'<head><script src="/agentkv/site.js"></script>', 1)
    head, body, tail = page.rpartition(b"</body>")
    return head + f'<script src="/agentkv/{template.glue}"></script>'.encode() + body + tail


class SiteServer(ThreadingHTTPServer):
    """Serves one template from memory until closed; a context manager. `url` ends without a slash."""

    daemon_threads = True

    def __init__(self, template: Template, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), partial(_Handler, content_of(template)))
        self.template = template

    @property
    def url(self) -> str:
        """Its origin."""
        return f"http://127.0.0.1:{self.server_port}"

    def address(self, page: str) -> str:
        """The address of a page by its file name."""
        return f"{self.url}/{self.template.folder}{page}"

    def start(self) -> SiteServer:
        """Serve from a thread of its own; returns itself."""
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def wait(self) -> None:
        """Until it is closed."""
        self._thread.join()

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that leaves a page drops its connections; anything else is printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    def __enter__(self) -> SiteServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.server_close()


@cache
def serving(template: Template) -> SiteServer:
    """The server of this process for a template, started when it is first asked for."""
    return SiteServer(template).start()


class _Handler(BaseHTTPRequestHandler):
    """Answers from a table of contents; keeps the connection, because a page has a dozen files."""

    protocol_version = "HTTP/1.1"

    def __init__(self, content: Mapping[str, bytes], *args: object) -> None:
        self.content = content
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """A file, or 404."""
        name = unquote(urlsplit(self.path).path).lstrip("/")
        body = self.content.get(name)
        self.send_response(HTTPStatus.NOT_FOUND if body is None else HTTPStatus.OK)
        kind = guess_type(name)[0] or "application/octet-stream"
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if kind.startswith("text/") else kind)
        self.send_header("Content-Length", str(len(body or b"")))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *args: object) -> None:
        """Says nothing: the terminal belongs to the agent."""
