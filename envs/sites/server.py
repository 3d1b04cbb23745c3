"""Serves a package's pages on the loopback interface, with a clock that stands, data of ours and a memory of changes.

Every page gets `pages/site.js` first and the template's own glue (`pages/gentelella.js`, `pages/sb-admin.js`) last;
addresses of other hosts are taken out. A few exact replacements let the templates' scripts work on our data: versions
are pinned by checksum, so a text that is not there once is an error of ours and refused when the server is built.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from mimetypes import guess_type
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .packages import GENTELELLA, SB_ADMIN, Package, files_of

FOLDER = Path(str(files("agentkv.envs"))) / "sites" / "pages"
START = "start.html"  # an empty page of the origin, on which an episode is prepared
_FOREIGN = re.compile(rb'<link\b[^>]*href="https://[^"]*"[^>]*>')
_FOREIGN_PICTURE = re.compile(rb'(src=)"https://[^"]*"')
_FOREIGN_URL = re.compile(rb"url\(\"?https://[^)]*\)")
_MAIN = re.compile(rb'(<div class="(?:page-wrapper|container-fluid)">).*?(\s*<footer|\s*<!-- /.container-fluid -->)', re.S)


@dataclass(frozen=True)
class Template:
    """How the pages of a package are served.

    folder: where its pages are. glue: our script for them. patches: (file, text in it, text instead). added: pages of
    ours, (name, the template's page whose frame they have); what is in the frame lies in `pages/`. picture: of the
    template's own, where a page shows one of another host.
    """

    package: Package
    folder: str
    glue: str
    patches: tuple[tuple[str, str, str], ...]
    added: tuple[tuple[str, str], ...]
    picture: str


OFFICE = Template(
    GENTELELLA,
    "production/",
    "gentelella.js",
    (
        # each line: the place where a script of theirs has its data ready, and has not drawn them yet
        ("js/inbox-D12uPxEe.js", "export{I as initInbox}", 'site.bind("mail",s.messages);export{I as initInbox}'),
        ("js/kanban-BnuDD_rj.js", "export{v as initKanban}", 'site.bind("cards",l);export{v as initKanban}'),
        ("js/calendar-Bp3TgRiS.js", "export{w as initCalendar}", 'site.bind("events",r);export{w as initCalendar}'),
        ("js/file-manager-CWvXo8UM.js", "export{y as init", 'site.bind("files",o);export{y as init'),
        ("js/user_management-C9OoHCfA.js", "}]})}),m();", '}]})}),site.bind("users",i),m();'),
        ("js/contacts-De0hi9Ja.js", "t.innerHTML=e.map(", 'site.bind("contacts",e),t.innerHTML=e.map('),
        ("js/projects-Bg2eomVD.js", "s.innerHTML=r.map(", 'site.bind("projects",r),s.innerHTML=r.map('),
        ("js/orders-mZmMx6xu.js", ':t([{id:"#7841"', ':t(site.bind("orders",[{id:"#7841"'),
        ("js/orders-mZmMx6xu.js", 'createdAt:"Apr 20, 2026"}])', 'createdAt:"Apr 20, 2026"}]))'),
        ("js/e_commerce-VLdHK6g5.js", 'innerHTML=[["Aurora', 'innerHTML=site.bind("products",[["Aurora'),
        ("js/e_commerce-VLdHK6g5.js", '"baselayer"]].map(', '"baselayer"]]).map('),
        ("js/e_commerce-VLdHK6g5.js", 'href="product_detail.html"', 'href="product_detail.html?id=${c}"'),
        ("js/product_detail-Dv3v6cuq.js", "${a.value} × AdminLTE Pro", "${a.value} × ${site.product()}"),
        ("js/product_detail-Dv3v6cuq.js", "Redirecting to checkout…", "Added to cart"),
        ("js/chat-B3GLNMHd.js", "i(),o(),document.getElementById", 'site.chat(n,e),i(),o(),document.getElementById'),
        # two slips of theirs: the dialog of a new event closes at once, a file's menu lies outside of its file
        ("js/calendar-Bp3TgRiS.js", "action:()=>(f(l,c),!0)", "action:()=>(f(l,c),!1)"),
        ("js/file-manager-CWvXo8UM.js", '<button type="button" class="fm-item-menu"', '<span role="button" class="fm-item-menu"'),
        ("js/file-manager-CWvXo8UM.js", "</svg>\\n        </button>\\n      </button>", "</svg>\\n        </span>\\n      </button>"),
        # an answer that comes by itself, later
        ("js/chat-B3GLNMHd.js", 'n[a].push({from:"them",text:"Thanks — got it 👍",time:s}),o()', "0"),
        # a message stays until the next action, however slow the agent is
        ("js/toast-CBtjS_PZ.js", "duration:o=2600", "duration:o=864e5"),
        ("js/vendor-echarts--adq3UMa.js", 'animation:"auto",animationDuration:1e3', "animation:!1,animationDuration:0"),
    ),
    (("cart.html", "plain_page.html"),),
    "/images/user.png",
)
DASHBOARD = Template(
    SB_ADMIN,
    "",
    "sb-admin.js",
    (("vendor/chart.js/Chart.min.js", 'animation:{duration:1e3,easing:"easeOutQuart"', 'animation:{duration:0,easing:"linear"'),),
    (("ticket.html", "blank.html"),),
    "/img/undraw_profile_1.svg",
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
        inner = (FOLDER / name).read_bytes()
        found[template.folder + name] = _MAIN.sub(lambda m: m[1] + inner + m[2], found[template.folder + frame], count=1)
    found[START] = b"<!doctype html><html><head></head><body></body></html>"
    for name, page in found.items():
        if name.endswith(".html"):
            found[name] = _with_scripts(page, template)
        elif name.endswith(".css"):
            found[name] = _FOREIGN_URL.sub(b"none", page)
    for name in ("site.js", template.glue):
        found[f"agentkv/{name}"] = (FOLDER / name).read_bytes()
    return found


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
