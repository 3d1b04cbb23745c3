"""One page for each cache method, and a list of them: from docstrings and the rows of the board, nothing by hand.

`pages()` gives them as Markdown by file name; the site's hook (`site_hook.py`) puts them into the site. By itself,
`python docs/gen_methods.py FOLDER` writes them into a folder.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import agentkv  # noqa: F401  (registers gui-kv beside textkv's methods)
from textkv.expression import parse_call, split_parts
from textkv.method import REGISTRY, Capabilities, Method, list_methods

BOARD = Path(__file__).with_name("text-leaderboard.json")
BOARD_PAGE = "../text-leaderboard.md"
_ARXIV = re.compile(r"(?:arXiv )?(?<![\d.])(\d{4}\.\d{5})(?!\d)")
_BEHIND = {None: "no other method", "scorer": "any method that gives scores", "any": "any method that lets it"}


def pages() -> dict[str, str]:
    """Markdown by file name: `index.md` and `NAME.md` for every method of this repository."""
    rows = json.loads(BOARD.read_text(encoding="utf-8"))["rows"]
    # What other installed packages register is theirs to document.
    names = [name for name in list_methods() if _is_ours(REGISTRY.find(name))]
    return {"index.md": index(names), **{f"{name}.md": page(REGISTRY.find(name), rows) for name in names}}


def index(names: Sequence[str]) -> str:
    """The list: name, what it is in a sentence, where it comes from."""
    lines = ["# Methods", "", "| name | in a sentence | source | stands behind |", "|---|---|---|---|"]
    for name in names:
        cls = REGISTRY.find(name)
        # A variant is told from the method beside it by its own words; the module's are those of both.
        said = _prose(_sentence(_about(cls) if _leads(cls) else _body(cls))).replace("|", r"\|")
        lines.append(f"| [`{name}`]({name}.md) | {said} | {', '.join(sources(cls))} | {_BEHIND[cls.wraps]} |")
    return "\n".join(lines) + "\n"


def page(cls: type[Method], rows: Sequence[dict[str, Any]]) -> str:
    """One method's page. `rows` are those of the board, of all methods."""
    said = [name for name in (f.name for f in fields(Capabilities)) if getattr(cls.capabilities, name)]
    facts = [
        f"- Source: {', '.join(sources(cls)) or 'none: a baseline'}",
        f"- Code: `{cls.__module__.replace('.', '/')}.py`, class `{cls.__name__}`",
        f"- May stand behind: {_BEHIND[cls.wraps]}",
        f"- Capabilities: {', '.join(f'`{name}`' for name in said) or 'none'} "
        "([what they mean](../api/textkv.method.md))",
    ]
    parts = [f"# `{cls.name}`", _prose(_about(cls)), _prose(_body(cls)), "\n".join(facts)]
    parts += ["## Arguments", arguments(cls), "## On the board", board(cls.name, rows)]
    return "\n\n".join(parts) + "\n"


def sources(cls: type) -> list[str]:
    """Links to the papers that the module's docstring names, the first one first."""
    ids = dict.fromkeys(_ARXIV.findall(_about(cls)))
    return [f"[arXiv {number}](https://arxiv.org/abs/{number})" for number in ids]


def arguments(cls: type[Method]) -> str:
    """A table of a method's own and inherited fields, as far as a composition string may set them."""
    meanings = attributes(cls)
    types = get_type_hints(cls)
    own = [f for f in fields(cls) if f.name not in ("budget", "inner")]
    if not own:
        return "It takes none."
    lines = ["| argument | type | default | meaning |", "|---|---|---|---|"]
    for f in own:
        cells = (f.name, _type(types[f.name]), _default(f))
        cells = (*(f"`{cell}`" for cell in cells), _prose(meanings.get(f.name, "")))
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


def attributes(cls: type) -> dict[str, str]:
    """What the sections "Attributes:" say of each name; a subclass goes before what it is made from."""
    found: dict[str, str] = {}
    for parent in reversed(inspect.getmro(cls)):
        _, _, section = _own_doc(parent).partition("Attributes:\n")
        # The section ends where indentation does.
        section = re.split(r"\n(?=\S)", section)[0]
        for names, text in re.findall(r"^    ([\w, ]+): (.*(?:\n(?:     .*)?)*)", section, re.MULTILINE):
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def board(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """The method's rows, alone and in compositions: recall of all tasks with its interval, and what was held."""
    cells: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if name in [parse_call(part)[0] for part in split_parts(row["method"])]:
            cells.setdefault((row["method"], row["budget"]), {})[row["task"]] = row
    if not cells:
        return f"It has no row on [the board]({BOARD_PAGE}) yet."
    head = "| method | budget | recall (95 %) | perplexity | bytes held | of the full cache | tokens stored |"
    lines = [f"On the embedded model; what is asked, and all methods beside it, on [the board]({BOARD_PAGE}).", ""]
    lines += [head, "|---|---|---|---|---|---|---|"]
    return "\n".join([*lines, *(_board_row(*key, tasks) for key, tasks in cells.items())])


def _board_row(method: str, budget: str, tasks: dict[str, dict[str, Any]]) -> str:
    if "recall" not in tasks:
        reason = next(iter(tasks.values())).get("reason", "not measured")
        return f"| `{method}` | {budget} | refused: {_prose(reason)} | | | | |".replace("\n", " ")
    row, text = tasks["recall"], tasks.get("text", {})
    perplexity = f"{text['perplexity']:.2f}" if "perplexity" in text else ""
    return (
        f"| `{method}` | {budget} | {row['recall']:.2f} ({row['low']:.2f} to {row['high']:.2f}) | {perplexity} "
        f"| {row['kv_bytes']:,.0f} | {row['kv_share']:.1%} | {row['tokens_stored']:,.0f} |"
    )


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in ("textkv", "agentkv")


def _leads(cls: type[Method]) -> bool:
    """Whether it is the first method of its file."""
    return cls is next(other for other in REGISTRY.values() if other.__module__ == cls.__module__)


def _type(hint: Any) -> str:
    """A type as one would write it: names such as `Bits` are spelled out, modules left away."""
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(_type(part) for part in get_args(hint))
    return "None" if hint is NoneType else re.sub(r"\b(?:\w+\.)+(?=\w)", "", inspect.formatannotation(hint))


def _about(cls: type) -> str:
    return inspect.getdoc(sys.modules[cls.__module__]) or ""


def _own_doc(cls: type) -> str:
    # Not inspect.getdoc, which hands a class without a docstring its parent's.
    return inspect.cleandoc(cls.__dict__.get("__doc__") or "")


def _body(cls: type) -> str:
    return _own_doc(cls).partition("Attributes:\n")[0].strip()


def _sentence(text: str) -> str:
    """The first paragraph in one line, without its source, which has a column of its own."""
    line = " ".join(text.partition("\n\n")[0].split())
    return _ARXIV.sub("", line).replace(" ()", "").replace(", ,", ",").rstrip(".")


def _default(f: Field) -> str:
    return "required" if f.default is MISSING else repr(f.default)


def _prose(text: str) -> str:
    """Docstring text as Markdown: papers become links, and no `<` becomes a tag. Code is left as it is."""
    # Every second piece is code: between backticks, or a line indented by four.
    pieces = re.split(r"(`[^`]*`|^    .*$)", text, flags=re.MULTILINE)
    for i in range(0, len(pieces), 2):
        pieces[i] = _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", pieces[i].replace("<", "&lt;"))
    return "".join(pieces)


def main() -> None:
    """Write all pages into the folder that was named."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
