"""Many prompts from one JSON-lines file into another: in batches, with progress, gone on with where it stopped.

A line of the input is `{"prompt": TEXT}` or `{"messages": [{"role": ..., "content": ...}]}`, and may have an "id"; it
ends at a line feed and nowhere else. A line of the output has the number of its input line and what made it, so that a
second start with the same files writes only what is missing and refuses to mix answers of different settings. An input
line that cannot be answered becomes a row with "error". Batches are cut by line number: an interrupted run gives the
same answers as one that was not.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from textkv.disk import disk_errors
from textkv.records import checked, parse


@dataclass(frozen=True)
class Item:
    """One line of the input: its number from 1 on, its own id if it has one, a text or messages.

    `error` says why the line cannot be answered, else None.
    """

    line: int
    prompt: str | list[dict[str, str]] | None
    id: Any = None
    error: str | None = None


def read_items(path: Path, strict: bool = False) -> list[Item]:
    """The prompts in `path`; empty lines are skipped, and so is a byte-order mark.

    Args:
        strict: a line that is no prompt is an error of the whole file, not of that line.

    Raises:
        ValueError: no line at all, or with `strict` one that is no prompt; the message has file and line.
    """
    items = []
    # Bytes, cut at line feeds: text may hold other line breaks (U+2028, U+0085), and one bad line must not spoil all.
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            items.append(_item(line, number))
        except ValueError as error:
            items.append(bad_item(Item(number, None), str(error), path, strict))
    if not items:
        raise ValueError(f'{path} has no prompts; write one object a line: {{"prompt": "..."}}')
    return items


def bad_item(item: Item, error: str, path: Path, strict: bool) -> Item:
    """The item with its error. Raises ValueError with file and line if `strict`."""
    if strict:
        raise ValueError(f"{path}:{item.line}: {error}")
    return replace(item, error=error)


def _item(line: bytes, number: int) -> Item:
    try:
        value = parse(line)
    except ValueError as error:
        raise ValueError(f"{error}; write one object a line, as UTF-8") from None
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        # Half of a surrogate pair passes in JSON's escapes, and the row of its answer could not be written.
        raise ValueError(
            f"holds {ascii(error.object[error.start])}, which is half a character; write it whole"
        ) from None
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise ValueError('needs "prompt" or "messages", one of the two')
    prompt = value.get("prompt", value.get("messages"))
    if "prompt" in value and not (isinstance(prompt, str) and prompt.strip()):
        raise ValueError(f'"prompt" is {json.dumps(prompt)[:40]}; give a text that is not empty')
    if "messages" in value and not (isinstance(prompt, list) and prompt and all(map(_is_message, prompt))):
        raise ValueError('"messages" must be a list of objects with "role" and "content"')
    return Item(number, prompt, value.get("id"))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def digest(settings: dict[str, Any]) -> str:
    """Twelve characters that differ where settings do."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def read_done(path: Path, items: Sequence[Item], settings: str) -> set[int]:
    """Numbers of the lines that `path` holds answers to; a last line that was torn is cut off.

    Raises:
        ValueError: a line that this command did not write, answers of other settings, or to another prompt. The file
            is left as it is then.
    """
    if not path.exists():
        return set()
    *lines, torn = path.read_bytes().split(b"\n")
    known, done = {item.line: item for item in items}, set()
    for number, line in enumerate(lines, 1):
        try:
            row = checked(parse(line), {"line": int, "settings": str})
            line_of, made_by, prompt = row["line"], row["settings"], row["prompt"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}:{number} is no answer of this command; give another --out") from error
        if made_by != settings:
            raise ValueError(f"{path}:{number} was written with other settings; give another --out, or those settings")
        if line_of not in known or known[line_of].prompt != prompt:
            raise ValueError(f"{path}:{number} answers another prompt than line {line_of} has now; give another --out")
        done.add(line_of)
    # A run that was killed while it wrote leaves a last line without its line break; that answer is made again. Any
    # other end is not ours, and a file is cut only where every byte of it was found to be.
    if torn:
        heads = [json.dumps(_about(item), ensure_ascii=False)[:-1].encode() for item in items if item.line not in done]
        if not any(head.startswith(torn) or torn.startswith(head) for head in heads):
            raise ValueError(f"{path}:{len(lines) + 1} is no answer of this command; give another --out")
        os.truncate(path, path.stat().st_size - len(torn))
    return done


def chunks(items: Sequence[Item], size: int, done: set[int]) -> list[list[Item]]:
    """The batches that hold an item that is not done yet."""
    # Cut by place in the file, done or not: a batch's composition must not depend on where a run stopped,
    # because bf16 results may differ in the last bit with the size of a batch.
    cut = [list(items[at : at + size]) for at in range(0, len(items), size)]
    return [chunk for chunk in cut if any(item.line not in done for item in chunk)]


def to_answer(items: Sequence[Item], done: set[int]) -> list[Item]:
    """The items that a model is needed for: without an error, and not done yet."""
    return [item for item in items if item.error is None and item.line not in done]


def answer_all(
    items: Sequence[Item],
    out: Path,
    size: int,
    settings: str,
    answer: Callable[[list[Item]], list[dict[str, Any]]],
) -> int:
    """Writes an answer to every item that has none; returns how many were written.

    Args:
        size: items of a batch.
        settings: digest of what else the answers depend on.
        answer: one row for each item of a batch, without line, id, prompt and settings; it is not asked for items
            that have an error, nor for a batch of which only such are missing.
    """
    done, written = read_done(out, items, settings), 0
    # Folders are missing where the file is written, and a link may lead elsewhere.
    Path(os.path.realpath(out)).parent.mkdir(parents=True, exist_ok=True)
    with (
        disk_errors(out),
        out.open("a", encoding="utf-8") as file,
        _progress(len(items), len(done)) as advance,
    ):
        for chunk in chunks(items, size, done):
            missing = [item for item in chunk if item.line not in done]
            # All that can be answered, done or not: together they give the numbers that they gave before.
            good = [item for item in chunk if item.error is None] if to_answer(missing, done) else []
            rows = dict(zip((item.line for item in good), answer(good) if good else [], strict=True))
            fresh = [(item, rows.get(item.line, {"error": item.error})) for item in missing]
            _append(file, [_about(item) | row | {"settings": settings} for item, row in fresh])
            written += len(fresh)
            advance(len(fresh))
    return written


def _about(item: Item) -> dict[str, Any]:
    about = {"line": item.line} if item.id is None else {"line": item.line, "id": item.id}
    return about | {"prompt": item.prompt}


def _append(file: IO[str], rows: Sequence[dict[str, Any]]) -> None:
    file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    file.flush()
    # Through the system's buffers too: after a power cut the file has whole answers or none.
    os.fsync(file.fileno())


@contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("prompts", total=total, completed=done)
        yield lambda count: progress.advance(task, count)
