"""`python -m tests.agents`: what is shown of the GUI agents and of their browser, as docs/gui-agents.json and
docs/gui-agents.md.

It runs the tests of all families and those of a person at a page (or the files of them that are named), prints the
table, and writes both files. `python -m tests.agents page` only draws the page. The figures of docs/grammar-fuzz.json
and docs/site-tasks.json are taken in.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from agentkv.grammars.fuzz import LIMIT_MS
from textkv.provenance import run_meta

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FILES = [f"tests/agentkv/models/test_{name}.py" for name in ("families", "true_width", "shop")]
FILES += [f"tests/envs/test_{name}.py" for name in ("everyday", "person", "manners")]
COLUMNS = {
    "prompt, token by token": ("test_the_prompt_token_by_token",),
    "grammar there and back": ("test_the_grammar_there_and_back", "test_points_are_counted_as_the_family_counts"),
    "hostile replies": ("test_hostile_replies", "test_unknown_words_are_refused"),
    "a step at true width": (
        "test_spans_cover_the_placeholders_of_six_full_screenshots", "test_points_come_back", "test_one_agent_step",
    ),
    "an episode on a page": ("test_an_episode_on_a_real_page",),
    "buys in the shop by `--url`": ("test_the_family_buys_a_teapot",),
}  # fmt: skip
LEFT = """
What is not here: GUI-Owl's `browser_use` names elements by numbers that its client draws into the screenshot. The verbs
of that tool are public, how the client finds and numbers elements is not, so nothing is drawn and such a call is
refused by its name. Holo 3 and later speak a schema of a closed runtime: none is invented. The Qwen families' pictures
are read by transformers' image processor and not by `qwen-vl-utils`, which cannot be imported without torchvision;
sizes and pixels are the same (`tests/agentkv/models/test_qwen_vl_utils.py`).
"""


class Collector:
    """For each test its family or what it is about, and whether it passed."""

    def __init__(self) -> None:
        self.about: dict[str, tuple[str, str]] = {}
        self.rows: list[dict[str, Any]] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Read each test's parameters, which its name has in words only."""
        for item in items:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            case, name = params.get("case"), item.function.__name__  # type: ignore[attr-defined]
            said = getattr(case, "name", None) or getattr(case, "__name__", name.removeprefix("test_"))
            family = params.get("family") or params.get("bench")
            self.about[item.nodeid] = (name, family or said.replace("_", " "))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test that was skipped has shown nothing."""
        if report.when == "call" or not report.passed:
            check, subject = self.about[report.nodeid]
            file = report.nodeid.partition("::")[0]
            row = {"file": file, "check": check, "subject": subject, "passed": report.passed}
            self.rows.append(row)


def shown(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of results, none if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []


def table(heads: list[str], lines: list[list[str]]) -> str:
    """A table of Markdown."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (heads, ["---"] * len(heads), *lines))


def families(rows: list[dict[str, Any]]) -> str:
    """Each family x what holds for it."""
    lines = []
    for family in dict.fromkeys(row["subject"] for row in rows if row["file"] == FILES[2]):
        own = [row for row in rows if row["subject"] == family]
        cells = [[row["passed"] for row in own if row["check"] in checks] for checks in COLUMNS.values()]
        lines.append([f"`{family}`", *("yes" if found and all(found) else "no" for found in cells)])
    return table(["family", *COLUMNS], lines)


def page(rows: list[dict[str, Any]], fuzzed: list[dict[str, Any]], tasks: list[dict[str, Any]], note: str) -> str:
    """The page of the site; `note` is what is to be known of the figures of tasks."""
    told = "What is shown of the agents and of the browser that they act in: `python -m tests.agents` runs the tests "
    parts = ["# GUI agents\n", told + "and writes this page; nothing here is written by hand.\n"]
    parts += ["## Families\n", families(rows), LEFT, "## Hostile replies\n"]
    limit = f"An answer is read within {LIMIT_MS:g} ms, or refused with a reason; none raised. Printed by\n"
    parts += [limit, "    python -m agentkv.grammars.fuzz --count 200000 --json docs/grammar-fuzz.json\n"]
    heads = ["grammar", "strings", "read as actions", "refused", "kinds of reasons", "exceptions", "slowest, ms"]
    names = ("strings", "actions", "refused", "reasons", "exceptions")
    counts = [[f"`{x['grammar']}`", *(f"{x[name]:,}" for name in names), f"{x['slowest_ms']:.1f}"] for x in fuzzed]
    parts += [table(heads, counts), "\n## What a person gets\n"]
    parts.append("By mouse and keyboard alone, each as a person would get it:\n")
    for file in FILES[3:]:
        own = [row for row in rows if row["file"] == file and row["check"] != "test_there_are_enough"]
        parts += [f"{sum(row['passed'] for row in own)} of {len(own)}, `{file}`:\n"]
        subjects = {subject: [row["passed"] for row in own if row["subject"] == subject] for subject in
                    dict.fromkeys(row["subject"] for row in own)}  # fmt: skip
        parts += ["".join(f"- {name}{'' if all(held) else ': failed'}\n" for name, held in subjects.items())]
    parts += ["## Tasks on sites\n", "Each by its script, and by random actions. Printed by\n"]
    parts += ["    python -m envs.oracle --sites --json docs/site-tasks.json\n", f"{note}\n", sites(tasks)]
    return "\n".join(parts)


def sites(tasks: list[dict[str, Any]]) -> str:
    """The tasks on sites, what solves them."""
    by = {(row["policy"], row["task"]): row for row in tasks}
    lines = []
    for task in dict.fromkeys(row["task"] for row in tasks):
        found = [by.get((policy, task)) for policy in ("script", "random")]
        cells = [f"{row['solved']} of {row['n']}" if row else "" for row in found]
        steps = f"{found[0]['steps']:.1f}" if found[0] else ""
        lines.append([task if task == "all" else f"`{task}`", cells[0], steps, cells[1]])
    return table(["task", "solved by its script", "steps", "at random"], lines)


def drawn() -> str:
    """The page from the files beside it."""
    found = [shown(DOCS / f"{name}.json") for name in ("gui-agents", "grammar-fuzz", "site-tasks")]
    meta = json.loads((DOCS / "site-tasks.json").read_text(encoding="utf-8"))["meta"] if found[2] else {}
    return page(*found, meta.get("note", ""))


def main(argv: list[str]) -> int:
    """The command; pytest's exit code."""
    code = 0
    if argv != ["page"]:
        collector = Collector()
        code = int(pytest.main(["-q", *(argv or FILES)], plugins=[collector]))
        ran = {row["file"] for row in collector.rows}
        found = [row for row in shown(DOCS / "gui-agents.json") if row["file"] not in ran] + collector.rows
        found.sort(key=lambda row: FILES.index(row["file"]))
        print(families(found))
        rows = ",\n".join(json.dumps(row) for row in found)
        meta = json.dumps(run_meta("tests.agents", [], 0))
        (DOCS / "gui-agents.json").write_text(f'{{"meta": {meta}, "rows": [\n{rows}\n]}}\n', encoding="utf-8")
    (DOCS / "gui-agents.md").write_text(drawn(), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
