"""Rows that an earlier start of a command has finished: a long run goes on behind them.

For commands whose rows are made whole, a group at a time; those that answer question by question have `eval.outcomes`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from textkv.records import checked, parse

Row = dict[str, Any]


def finished(path: Path | None, board: dict[str, Any], whole: Callable[[Row], bool]) -> list[Row]:
    """The rows of a file that are `whole`; none if there is no file.

    Args:
        board: what is measured, as plain JSON values: the file's own, in its meta, must be the same.

    Raises:
        ValueError: the file holds another board, or no rows.
    """
    if path is None or not path.exists():
        return []
    try:
        told = checked(parse(path.read_bytes()), {"meta": dict, "rows": list})
    except ValueError:
        raise ValueError(f"{path} holds no rows; give another --json") from None
    if told["rows"] and told["meta"].get("board") != board:
        raise ValueError(f"{path} holds another board ({told['meta'].get('board')}); give another --json")
    return [row for row in told["rows"] if whole(row)]
