"""Files that go into a page and come out of it: only from one folder, only into another, only up to a size."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import CDPSession, Download, FileChooser, Page

from .boundary import forgive
from .events import Record, Transfer
from .sheet import Sheet

LIMIT = 50_000_000  # bytes of one download
MOST = 20  # downloads in one episode
_OFFERED = 12
_PATIENCE = 10.0  # seconds for a download to end
_CANCEL = "Cancel"
_NAME = 100  # characters


class Transfers:
    """`offered`: the folder whose files may be uploaded, None = no uploads. `kept`: where downloads go, made when the
    first one comes, None = no downloads. What happens goes into `record`.
    """

    def __init__(self, offered: Path | None, kept: Path | None, record: Record, limit: int = LIMIT) -> None:
        self.offered = offered
        self.kept = kept
        self.record = record
        self.limit = limit
        self.sheet: Sheet | None = None
        self._chooser: FileChooser | None = None
        self.busy = 0  # downloads on their way
        self._progress: dict[str, tuple[int, str]] = {}  # by address: bytes, Chromium's word for the state
        self._urls: dict[str, str] = {}
        self._count = 0

    def watch(self, page: Page, session: CDPSession) -> None:
        """Having a listener keeps the system's own file dialog shut."""
        page.on("download", self._on_download)
        page.on("filechooser", self._on_chooser)
        session.on("Page.downloadWillBegin", lambda event: self._urls.update({event["guid"]: event["url"]}))
        session.on("Page.downloadProgress", self._on_progress)

    def _names(self) -> dict[str, Path]:
        if self.offered is None:
            return {}
        found = sorted(path for path in self.offered.iterdir() if path.is_file() and not path.is_symlink())
        return {path.name: path for path in found}

    def _on_chooser(self, chooser: FileChooser) -> None:
        names = list(self._names())
        if not names:
            why = "uploads are refused" if self.offered is None else "there is no file to offer"
            self.record.refuse("upload", chooser.page.url, why)
            return
        several = " (several: their names with commas between them)" if chooser.is_multiple() else ""
        self._chooser = chooser
        self.sheet = Sheet(f"Choose a file or type its name{several}", ("Open", _CANCEL), tuple(names[:_OFFERED]), "")
        rest = f" and {len(names) - _OFFERED} more" if len(names) > _OFFERED else ""
        self.record.tell(f"the page asks for a file; there are: {', '.join(names[:_OFFERED])}{rest}")

    def close(self) -> str:
        """Give the page what the sheet says; returns "" or why no file was chosen."""
        sheet, chooser = self.sheet, self._chooser
        self.sheet = self._chooser = None
        if sheet is None or chooser is None or sheet.reply in ("", _CANCEL):
            return ""
        wanted = [sheet.reply] if sheet.reply in sheet.choices else re.split(r"\s*,\s*", (sheet.typed or "").strip())
        names = self._names()
        strange = [name for name in wanted if name not in names]
        if strange:
            return f"there is no file {strange[0][:80]!r} to choose; there are: {', '.join(list(names)[:_OFFERED])}"
        if len(wanted) > 1 and not chooser.is_multiple():
            return f"the page takes one file, {len(wanted)} were named; nothing was chosen"
        forgive(lambda: chooser.set_files([names[name] for name in wanted]))
        for name in wanted:
            self.record.files.append(Transfer("upload", str(names[name]), names[name].stat().st_size))
            self.record.tell(f"the file {name} was chosen")
        return ""

    def _on_progress(self, event: dict[str, Any]) -> None:
        size = max(event["receivedBytes"], event["totalBytes"])
        self._progress[self._urls.get(event["guid"], "")] = (size, event["state"])

    def _on_download(self, download: Download) -> None:
        """Runs beside the step: it watches the size while the file comes."""
        self._count += 1
        self.busy += 1  # until it is kept and recorded
        if self.kept is None:
            reason = "downloads are refused"
        elif self._count > MOST:
            reason = f"an episode may have {MOST} downloads"
        else:
            reason = self._wait(download)
            self._progress.pop(download.url, None)
        if reason:
            self.record.refuse("download", download.url, reason)
            forgive(download.cancel)
        else:
            forgive(lambda: self._keep(download))
        self.busy -= 1

    def _wait(self, download: Download) -> str:
        """Why it cannot be kept, "" once it is complete."""
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            size, state = self._progress.get(download.url, (0, "inProgress"))
            if size > self.limit:
                return f"it is larger than {self.limit} bytes"
            if state != "inProgress":
                return "" if state == "completed" else "it broke off"
            download.page.wait_for_timeout(20)
        return f"it took longer than {_PATIENCE:g} s"

    def _keep(self, download: Download) -> None:
        assert self.kept is not None
        self.kept.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^\w.() -]", "_", download.suggested_filename).strip(". ")[:_NAME] or "download"
        path = self.kept / name
        number = 1
        while path.exists():
            path = self.kept / f"{Path(name).stem} ({number}){Path(name).suffix}"
            number += 1
        download.save_as(path)
        size = path.stat().st_size
        self.record.files.append(Transfer("download", str(path), size))
        self.record.tell(f"the file {path.name} was downloaded ({size} bytes)")

    def forget(self) -> None:
        """A new episode: count from nothing."""
        self.sheet = self._chooser = None
        self._progress.clear()
        self._count = 0
