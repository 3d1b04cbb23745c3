"""Pages of methods are made from docstrings and the board: every method has one, and it says what they say."""

import json
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from textkv.method import REGISTRY, Method, list_methods

ROOT = Path(__file__).parents[1]
BASELINES = {"full", "window"}  # of no paper


@pytest.fixture(scope="module")
def gen_methods():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import gen_methods
    finally:
        sys.path.pop(0)
    return gen_methods


@pytest.fixture(scope="module")
def pages(gen_methods):
    return gen_methods.pages()


@pytest.fixture(scope="module")
def ours(gen_methods):
    return [name for name in list_methods() if gen_methods._is_ours(REGISTRY.find(name))]


def test_every_method_has_a_page_and_a_line_in_the_list(pages, ours):
    assert set(pages) == {"index.md", *(f"{name}.md" for name in ours)}
    assert re.findall(r"^\| \[`(.+?)`\]", pages["index.md"], re.MULTILINE) == ours
    # A variant says how it differs; the words of its file would be those of the method that it varies.
    lines = [line.split("|")[2] for line in pages["index.md"].splitlines() if line.startswith("| [")]
    assert len(set(lines)) == len(lines)


def test_every_page_names_its_paper_and_its_code(pages, ours):
    for name in ours:
        text, cls = pages[f"{name}.md"], REGISTRY.find(name)
        assert ("https://arxiv.org/abs/" in text) == (name not in BASELINES), name
        path = re.search(r"Code: `(.+?)`, class `(.+?)`", text)
        assert (ROOT / path[1]).is_file() and path[2] == cls.__name__
        assert text.startswith(f"# `{name}`\n")


def test_every_argument_has_a_meaning(gen_methods, ours):
    for name in ours:
        cls = REGISTRY.find(name)
        own = {f.name for f in fields(cls)} - {"budget", "inner"}
        assert own <= set(gen_methods.attributes(cls)), name


def test_an_argument_row(pages):
    assert "| `window` | `int` | `32` | observation window in tokens." in pages["pyramidkv.md"]  # inherited
    assert "| `bits` | `Literal[2, 4, 8, 'fp8']` | `4` |" in pages["kivi.md"]
    assert r"| `channels` | `int \| None` | `None` |" in pages["kivi.md"]
    assert "It takes none." in pages["full.md"]


def test_attributes_are_told_apart(gen_methods):
    class Parent:
        """One.

        Attributes:
            a, b: both of them: a colon
                and a second line.
            c: theirs.

        After it.
            d: no attribute.
        """

    class Child(Parent):
        """Two.

        Attributes:
            c: its own.
        """

    both = "both of them: a colon and a second line."
    assert gen_methods.attributes(Child) == {"a": both, "b": both, "c": "its own."}


def test_rows_are_those_of_the_board(gen_methods, pages):
    rows = json.loads(gen_methods.BOARD.read_text(encoding="utf-8"))["rows"]
    (row,) = (r for r in rows if (r["method"], r["budget"], r["task"]) == ("snapkv", "0.2", "recall"))
    (line,) = (line for line in pages["snapkv.md"].splitlines() if line.startswith("| `snapkv` | 0.2 |"))
    assert f"| {row['recall']:.2f} ({row['low']:.2f} to {row['high']:.2f}) |" in line
    assert f"| {row['kv_bytes']:,.0f} | {row['kv_share']:.1%} |" in line
    shown = {tuple(m) for text in pages.values() for m in re.findall(r"^\| `(.+?)` \| ([\d.]+) \|", text, re.MULTILINE)}
    assert {(r["method"], r["budget"]) for r in rows} <= shown


def test_a_composition_is_on_the_pages_of_all_its_parts(gen_methods):
    figures = {"recall": 0.5, "low": 0.4, "high": 0.6, "kv_bytes": 1e6, "kv_share": 0.25, "tokens_stored": 100.0}
    rows = [{"method": "h2o+mikv(16,2)", "budget": "0.2", "task": "recall", **figures}]
    line = "| `h2o+mikv(16,2)` | 0.2 | 0.50 (0.40 to 0.60) |  | 1,000,000 | 25.0% | 100 |"
    assert all(gen_methods.board(name, rows).endswith(line) for name in ("h2o", "mikv"))
    assert gen_methods.board("snapkv", rows).endswith("yet.")
    refused = [{"method": "h2o", "budget": "0.1", "task": "refused", "reason": "too small"}]
    assert "| `h2o` | 0.1 | refused: too small |" in gen_methods.board("h2o", refused)


def test_no_text_becomes_a_tag_and_code_stays(gen_methods):
    made = gen_methods._prose("score <q, k> and `<R q, k>` (2404.14469)\n\n    x < y, arXiv 2404.14469\n")
    link = "[arXiv 2404.14469](https://arxiv.org/abs/2404.14469)"
    assert made == f"score &lt;q, k> and `<R q, k>` ({link})\n\n    x < y, arXiv 2404.14469\n"


def test_methods_of_other_packages_have_no_page(gen_methods, pages):
    @dataclass(frozen=True)
    class Theirs(Method):
        pass

    Theirs.__module__ = "mypkg.mine"
    assert not gen_methods._is_ours(Theirs)


def test_the_script_writes_the_pages(gen_methods, pages, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gen_methods.py", str(tmp_path / "pages")])
    gen_methods.main()
    assert {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "pages").iterdir()} == pages


def test_the_home_page_is_the_readme_with_its_links_turned(gen_methods):
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import site_hook
    finally:
        sys.path.pop(0)
    text = "![A](docs/a.png) [B](CONTRIBUTING.md)\n| `kivi(4)`, `other` | x |\n| `full` and | y |\n"
    assert site_hook.root_page(text, ["kivi", "full"]) == (
        "![A](a.png) [B](contributing.md)\n| [`kivi(4)`](methods/kivi.md), `other` | x |\n| `full` and | y |\n"
    )


def test_tables_say_what_their_rows_say():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import tables
    finally:
        sys.path.pop(0)
    pages = [path.read_text(encoding="utf-8") for path in tables.PAGES]
    assert [tables.renewed(page) for page in pages] == pages, "run make tables"
    shown = [name for page in pages for name in re.findall(r"<!-- table ([\w-]+) -->", page)]
    assert sorted(shown) == sorted(tables.TABLES)


def test_the_page_of_agents_says_what_its_rows_say():
    agents = pytest.importorskip("tests.agents", reason="the extra `agents` is not installed")
    page = (ROOT / "docs" / "gui-agents.md").read_text(encoding="utf-8")
    assert agents.drawn() == page, "run python -m tests.agents page"
    assert agents.shown(ROOT / "docs" / "grammar-fuzz.json") and agents.shown(ROOT / "docs" / "site-tasks.json")
