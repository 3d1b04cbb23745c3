"""Whatever ends a command ends all that it started: workers, drivers, browsers, temporary folders.

Each start of a command takes seconds, so each meets one of the signals; with ALL_ENDINGS=1 all three, and those too
that take long to start.
"""

import os
import re
import shutil
import signal

import pytest

from tests.endings import CASES, OWN, SOURCES
from tests.processes import ROOT, Command, start
from tests.reliability.commands import FOLDERS

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals")
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
PROMISED = 3.0  # seconds from Ctrl-C to the exit of the command and of all that it started
STARTS = re.compile(
    r"(?<!def )(?<!class )\b(Workers|Browser|ran|Popen|TemporaryDirectory|NamedTemporaryFile|mkdtemp|mkstemp|"
    r"sync_playwright|driver|guarded|Shop|SiteServer|Server|Listener|DataLoader|ThreadPoolExecutor|ProcessPoolExecutor)\(|"
    r"with started|subprocess\.run"
)


def chosen():
    """(name of a case, signal)."""
    for name, case in CASES.items():
        numbers = SIGNALS if os.environ.get("ALL_ENDINGS") else [case.ci] if case.ci else []
        for number in numbers:
            marks = [pytest.mark.browser] if case.browser else []
            yield pytest.param(name, number, id=f"{name}-{number.name}", marks=marks)


def check(command: Command, number: int, name: str) -> None:
    """The exit code, one line after a Ctrl-C, and nothing left."""
    assert command.send(number) == SIGNALS[number], command.told
    assert command.left() == []
    print(f"{name} {signal.Signals(number).name}: {command.took:.2f} s, all {command.took_all:.2f} s")
    assert "Traceback" not in command.told
    if number != signal.SIGKILL:
        assert command.temporary == []
    if number == signal.SIGINT:
        assert command.told.splitlines()[-1].startswith(f"{name}: stopped")
        assert command.took_all < PROMISED


@pytest.mark.parametrize(("name", "number"), list(chosen()))
def test_a_command_ends_with_all_that_it_started(name, number, tmp_path, reliability):
    command = CASES[name].begin(tmp_path / "c", name)
    title = name.partition(",")[0]
    try:
        check(command, number, title)
    finally:
        command.kill()
    quick = " within 3 s" if number == signal.SIGINT else ""
    folder = "" if number == signal.SIGKILL else ", no temporary folder"
    told = f"exit {SIGNALS[number]}{quick}, no process{folder}"
    reliability(3, signal.Signals(number).name, title, told)


def test_every_file_that_starts_something_is_shown_to_end():
    found = {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if STARTS.search(path.read_text(encoding="utf-8"))
    }
    assert found == {*SOURCES, *OWN}
    assert set(SOURCES.values()) <= set(CASES)


@pytest.mark.browser
def test_a_worker_that_cannot_start_tells_why(tmp_path, reliability):
    browser = tmp_path / "browser"
    browser.write_text("#!/bin/sh\nexit 3\n")
    browser.chmod(0o755)
    grid = "--tasks click-test --episodes 1 --methods full --history 1 --workers 2 --out study".split()
    command = start(tmp_path / "c", "eval.webtasks", *grid, "--chromium", str(browser))
    assert command.process.wait(240) == 2
    last = command.told.splitlines()[-1]
    assert last.startswith("eval.webtasks: ") and str(browser) in last and "Traceback" not in command.told
    assert not command.temporary
    shutil.rmtree(command.temp)
    reliability(3, "a worker that cannot start", "eval.webtasks", "one line, exit 2")
