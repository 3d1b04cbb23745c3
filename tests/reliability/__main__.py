"""`python -m tests.reliability [FILE ...]`: run the tests that tell outcomes (all of them, or those of the files named)
and write docs/reliability.json and docs/reliability.md.

`python -m tests.reliability add ROWS.json` takes the rows of a command in instead: {"rows": [{"kind", "fault",
"command", "outcome", "by", "n"}]}. `python -m tests.reliability page` only draws the page. Each time
the rows of docs/fuzz.json and docs/soak.json are taken in.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .measured import measured
from .rows import Row, merge, read

TESTS = Path(__file__).parents[1]
FIXTURE = "reliability"


class Collector:
    """Keeps the tests that tell outcomes, and what they tell if they pass."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Only those."""
        items[:] = [item for item in items if FIXTURE in getattr(item, "fixturenames", ())]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test that fails has shown nothing."""
        if report.when == "call" and report.passed:
            by = report.nodeid.partition("::")[0]
            self.rows += [Row(**told, by=by) for name, told in report.user_properties if name == FIXTURE]


def main(argv: list[str]) -> int:
    """The command; pytest's exit code."""
    if argv == ["page"]:
        merge(measured())
        return 0
    if argv[:1] == ["add"]:
        merge(row for name in argv[1:] for row in read(Path(name)))
        return 0
    told = [str(path) for path in sorted(TESTS.rglob("test_*.py")) if f"{FIXTURE}(" in path.read_text(encoding="utf-8")]
    collector = Collector()
    code = pytest.main(["-q", *(argv or told)], plugins=[collector])
    merge([*collector.rows, *measured()])
    print(f"{len(collector.rows)} cases")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
