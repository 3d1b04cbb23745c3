"""The site's pages that no file in docs/ holds: mkdocs calls `on_files` before it builds the navigation.

Home, contributing and changes are the files at the root of the repository with their links turned; methods come from
`gen_methods.py`; the reference names modules whose docstrings mkdocstrings reads.
"""

from __future__ import annotations

import re
from pathlib import Path

import gen_methods
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from textkv.expression import parse_call
from textkv.kernels import OPERATIONS

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files at the root, and the pages that they become."""
REFERENCE = (
    "textkv", "textkv.method", "textkv.segments.base", "textkv.retrievers.base", "textkv.conformance", "textkv.command",
    "textkv.arguments", "textkv.reuse.kvcomm", "textkv.reuse.epicache", "agentkv", "dlm",
)  # fmt: skip
KERNELS = "textkv.kernels"
TITLE = "    options:\n      heading_level: 1\n      show_root_full_path: true\n"
"""The module heads its page."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages and writes the two lists of them into the navigation."""
    methods = gen_methods.pages()
    made = {f"methods/{name}": text for name, text in methods.items()}
    made |= {f"api/{module}.md": f"::: {module}\n{TITLE}" for module in REFERENCE}
    made[f"api/{KERNELS}.md"] = kernels_page()
    for name, page in PAGES.items():
        made[page] = root_page((ROOT / name).read_text(encoding="utf-8"), [m.removesuffix(".md") for m in methods])
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    # Listed by hand they would be forgotten: a new method is one new file.
    for entry in config.nav:
        if "Methods" in entry:
            entry["Methods"] = [f"methods/{name}" for name in methods]
        elif "Reference" in entry:
            entry["Reference"] = [{module: f"api/{module}.md"} for module in (*REFERENCE, KERNELS)]
    return files


def root_page(text: str, methods: list[str]) -> str:
    """A file of the repository's root as a page: links point into the site, methods at their pages."""
    text = text.replace("](docs/", "](")
    for name, page in PAGES.items():
        text = text.replace(f"]({name})", f"]({page})")

    def linked(match: re.Match) -> str:
        shown = [(name, parse_call(name)[0]) for name in re.findall(r"`([^`]+)`", match[1])]
        cell = ", ".join(f"[`{name}`](methods/{base}.md)" if base in methods else f"`{name}`" for name, base in shown)
        return f"| {cell} |"

    # The first cell of a row that is nothing but names.
    return re.sub(r"^\| (`[^`|]+`(?:, `[^`|]+`)*) \|", linked, text, flags=re.MULTILINE)


def kernels_page() -> str:
    """The operations one by one: the package fetches each when it is asked for, which no reader of source can see."""
    listed = "\n\n".join(f"::: {KERNELS}.{name}.{name}" for name in OPERATIONS)
    return f"::: {KERNELS}\n{TITLE}      members: []\n\n{listed}\n"
