"""Which addresses a page may reach: a pure decision, so that it can be tested without a browser.

`AllowList.refusal(url)` says why a request is refused ("" = admitted). Default: nothing but `about:blank`. A task adds
its own origin (`http://host:port`) or the folder of its files. `data:` and `blob:` carry inline pictures and fonts, so
they pass as sub-resources and never as something to navigate to. Everything else is refused: `javascript:`, `chrome:`,
`view-source:`, `ftp:`, another host, another port, a file outside the folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import url2pathname

_PORTS = {"http": 80, "https": 443}
_SOCKETS = {"ws": "http", "wss": "https"}
_INLINE = ("data", "blob")
_EMPTY_PAGES = ("about:blank", "about:srcdoc")


def _split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return parts


def origin(url: str) -> str:
    """`scheme://host:port` of an http(s) or ws(s) address (sockets are mapped to http), "" when there is none."""
    parts = _split(url)
    if parts is None or not parts.hostname:
        return ""
    scheme = _SOCKETS.get(parts.scheme, parts.scheme)
    if scheme not in _PORTS:
        return ""
    host = parts.hostname.rstrip(".")
    if not host.isascii():
        try:
            host = host.encode("idna").decode()
        except UnicodeError:
            return ""
    return f"{scheme}://{host}:{parts.port or _PORTS[scheme]}"


def file_path(url: str) -> Path | None:
    """The file that a `file:` address names, links resolved; None for anything else and for `file://host/...`."""
    parts = _split(url)
    if parts is None or parts.scheme != "file" or parts.netloc:
        return None
    try:
        return Path(url2pathname(unquote(parts.path))).resolve()
    except (OSError, ValueError, RuntimeError):
        return None


@dataclass(frozen=True)
class AllowList:
    """Origins ("http://127.0.0.1:8000") and folders that a page may load from; both may be empty.

    Raises ValueError for an entry that is neither an http(s) origin nor a folder.
    """

    origins: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        for entry in self.origins:
            if not origin(entry):
                raise ValueError(f"allow={entry!r} is not an http(s) origin; write it like 'https://example.com'")
        object.__setattr__(self, "origins", tuple(origin(entry) for entry in self.origins))
        object.__setattr__(self, "folders", tuple(Path(folder).resolve() for folder in self.folders))

    def __or__(self, other: AllowList) -> AllowList:
        return AllowList(self.origins + other.origins, self.folders + other.folders)

    def refusal(self, url: str, navigation: bool = True) -> str:
        """Why `url` may not be loaded, "" when it may; `navigation` = as a page or frame, not as a sub-resource."""
        if url in _EMPTY_PAGES:
            return ""
        scheme = url.partition(":")[0].lower()
        if scheme in _INLINE:
            return f"{scheme}: addresses may not be navigated to" if navigation else ""
        if scheme == "file":
            path = file_path(url)
            inside = path is not None and any(path.is_relative_to(folder) for folder in self.folders)
            return "" if inside else "the file is outside the task's folder"
        place = origin(url)
        if not place:
            return f"the scheme {scheme}: is not allowed"
        return "" if place in self.origins else f"the origin {place} is not on the allow-list"
