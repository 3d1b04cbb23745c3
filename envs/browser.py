"""One Chromium driven by Playwright's sync API: found, launched, watched, relaunched after a crash.

Not here: what a page may do (tab.py, allow.py) and what a task is (task.py). Playwright's sync API belongs to the
thread that started it and cannot run inside an asyncio loop; browsers of one thread share one driver process. This
limits what a page can reach but is no security boundary: for pages you do not trust, run the whole process in a
container.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from playwright.sync_api import Browser as Chromium
from playwright.sync_api import Error, Playwright

from . import fonts
from .allow import AllowList
from .boundary import NOWHERE
from .driver import driver
from .tab import BrowserCrashed, Manners, Tab

CHROMIUM_VARIABLE = "AGENTKV_CHROMIUM"
_MESSAGE = 300
_NAMES = ("chromium", "chromium-browser", "google-chrome")
# draws the same pixels without a window around them, in half the time
_SHELLS = ("chromium-headless-shell",)
FLAGS = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    # WebRTC would otherwise open UDP sockets that no request handler sees
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
    # the same pixels on every machine with the same fonts
    "--font-render-hinting=none",
    "--disable-lcd-text",
    # redrawing only a part of a tile rounds its edges differently
    "--disable-partial-raster",
    # a picture that is still being decoded would be left out of a screenshot
    "--disable-checker-imaging",
    # a page that is scrolled by keys or wheel is there at once
    "--disable-smooth-scrolling",
)


class ChromiumMissing(RuntimeError):
    """No Chromium was found, or the one that was named cannot be started."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}; install one with `apt-get install chromium` or `playwright install chromium`, or name yours: "
            f"Browser(executable='/path/to/chromium') or the environment variable {CHROMIUM_VARIABLE}"
        )


class _Driver(threading.local):
    """Playwright of this thread: a second driver in one thread is refused, so browsers share it."""

    playwright: Playwright | None = None
    users: int = 0

    def __init__(self) -> None:
        self.stack = ExitStack()

    def acquire(self) -> Playwright:
        """The driver, started for its first user."""
        if self.playwright is None:
            self.playwright = self.stack.enter_context(driver())
        self.users += 1
        return self.playwright

    def release(self) -> None:
        """One user less; the last one stops the driver."""
        self.users -= 1
        if self.users == 0 and self.playwright is not None:
            self.playwright = None
            self.stack.close()


_DRIVER = _Driver()


def _own_download(playwright: Playwright | None) -> Path | None:
    path = Path(playwright.chromium.executable_path) if playwright else None
    return path if path and path.exists() else None


def find_chromium(
    explicit: str | Path | None = None, playwright: Playwright | None = None, headed: bool = False
) -> Path:
    """Path of a Chromium: `explicit`, else the variable AGENTKV_CHROMIUM, else Playwright's own, else one on the PATH.

    `playwright` is a running driver to ask for its own download (without it that place is skipped). On the PATH a
    chromium-headless-shell comes first unless `headed`.
    Raises `ChromiumMissing` when there is none, or when the one that was named does not exist.
    """
    named = explicit or os.environ.get(CHROMIUM_VARIABLE)
    if named:
        found = shutil.which(str(named))
        if found is None:
            raise ChromiumMissing(f"there is no executable at {str(named)!r}")
        return Path(found)
    own = _own_download(playwright)
    if own is not None:
        return own
    for name in _NAMES if headed else _SHELLS + _NAMES:
        found = shutil.which(name)
        if found:
            return Path(found)
    raise ChromiumMissing(f"no Chromium found (looked for {', '.join(_NAMES)} on the PATH)")


def _reads_our_config(chromium: Chromium) -> bool:
    """Asked of the browser itself: macOS has no fontconfig, and a wrapper around Chromium may set its own."""
    page = chromium.new_page()
    try:
        return page.evaluate(fonts.KNOWS_CONFIG)
    finally:
        page.close()


class Browser:
    """A context manager around one Chromium process; `open` gives an isolated `Tab` per episode.

    executable: path of the browser, None = `find_chromium()`. headed: show a window. allow: further http(s) origins
    that every task may reach. sandbox: Chromium's own; None = on unless the process runs as root, where it is refused.
    machine_fonts: draw with the machine's fonts, for live pages; tasks are drawn with ours alone (`envs.fonts`), to
    look the same everywhere.
    Raises `ChromiumMissing` on entering when no browser can be started.
    """

    def __init__(
        self,
        executable: str | Path | None = None,
        headed: bool = False,
        allow: Sequence[str] = (),
        sandbox: bool | None = None,
        machine_fonts: bool = False,
    ) -> None:
        self.executable = executable
        self.headed = headed
        self.allow = AllowList(tuple(allow))
        self.sandbox = (not hasattr(os, "geteuid") or os.geteuid() != 0) if sandbox is None else sandbox
        self.machine_fonts = machine_fonts
        self._faces = ""  # script that brings our fonts into a page, where Chromium does not find them by itself
        self._chromium: Chromium | None = None
        self._pid: int | None = None
        self._holds_driver = False

    def __enter__(self) -> Browser:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """True while the process answers."""
        return self._chromium is not None and self._chromium.is_connected()

    @property
    def version(self) -> str:
        """Chromium's version, "" when it does not run."""
        return self._chromium.version if self._chromium is not None and self.alive else ""

    @property
    def pid(self) -> int | None:
        """Process id of the running Chromium."""
        return self._pid

    def start(self) -> Browser:
        """Launch if it does not run; returns itself."""
        if self.alive:
            return self
        playwright = self._acquire()
        try:
            executable = find_chromium(self.executable, playwright, self.headed)
            self._chromium = self._launch(playwright, executable)
        except Exception:
            self._release()
            raise
        return self

    def _launch(self, playwright: Playwright, executable: Path) -> Chromium:
        try:
            chromium = playwright.chromium.launch(
                executable_path=executable,
                headless=not self.headed,
                chromium_sandbox=self.sandbox,
                handle_sigint=False,  # Ctrl-C belongs to the program, which closes the browser in order
                args=list(FLAGS),
                # What Chromium asks for itself (updates, lists, models) goes nowhere, without a look at DNS; a tab's
                # context has a proxy of its own.
                proxy={"server": NOWHERE},
                env=dict(os.environ) if self.machine_fonts else fonts.environment(os.environ),
            )
            self._faces = "" if self.machine_fonts or _reads_our_config(chromium) else fonts.page_script()
        except Error as error:
            said = [line for line in error.message.splitlines() if "[err]" in line] or error.message.splitlines()
            raise ChromiumMissing(f"{executable} did not start: {said[0].strip()[:_MESSAGE]}") from error
        session = chromium.new_browser_cdp_session()
        processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
        self._pid = next((p["id"] for p in processes if p["type"] == "browser"), None)
        session.detach()
        return chromium

    def _acquire(self) -> Playwright:
        if not self._holds_driver:
            _DRIVER.acquire()
            self._holds_driver = True
        assert _DRIVER.playwright is not None
        return _DRIVER.playwright

    def _release(self) -> None:
        if self._holds_driver:
            self._holds_driver = False
            _DRIVER.release()

    def relaunch(self) -> Browser:
        """Throw the process away (dead or not) and launch a new one; every open tab is lost."""
        self._stop()
        return self.start()

    def close(self) -> None:
        """Stop the process; safe to call twice."""
        self._stop()
        self._release()

    def _stop(self) -> None:
        if self._chromium is not None:
            with suppress(Error):  # it may have died on its own, and then there is nothing left to stop
                self._chromium.close()
        self._chromium = None
        self._pid = None

    @contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """Kill the process when the block takes longer: the only cure for a page that never gives back control.

        The pending call then fails, and `BrowserCrashed` is raised with the time-out in its message.
        """
        expired = threading.Event()
        timer = threading.Timer(seconds, self._kill, args=(self._pid, expired))
        timer.daemon = True
        timer.start()
        try:
            yield
        except (Error, BrowserCrashed) as error:
            if not expired.is_set():
                raise
            raise BrowserCrashed(f"the page did not answer within {seconds:g} s, so the browser was stopped") from error
        finally:
            timer.cancel()

    @staticmethod
    def _kill(pid: int | None, expired: threading.Event) -> None:
        expired.set()
        if pid is None:
            return
        with suppress(ProcessLookupError):  # it ended in the same moment, which is what was wanted
            os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))

    def open(
        self,
        allow: AllowList,
        viewport: tuple[int, int],
        device_scale: float = 1.0,
        manners: Manners | None = None,
    ) -> Tab:
        """A fresh isolated tab: no cookies, no storage, nothing shared with another tab. Raises `BrowserCrashed`."""
        if self._chromium is None or not self.alive:
            raise BrowserCrashed("the browser is not running; call relaunch()")
        return Tab(self._chromium, self.allow | allow, viewport, device_scale, self._faces, manners)
