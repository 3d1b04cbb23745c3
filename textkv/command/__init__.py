"""What every command does: arguments that are checked one by one, results that never replace a stranger's file, workers
that end with it, and one line for an error.
"""

from textkv.command.arguments import (
    count,
    device,
    fraction,
    lengths,
    names,
    natural,
    naturals,
    numbers,
    readable,
    seconds,
    seed,
    size,
)
from textkv.command.ending import run, terminable
from textkv.command.results import results_file, write_rows, write_text
from textkv.command.workers import Workers

__all__ = [
    "Workers",
    "count",
    "device",
    "fraction",
    "natural",
    "naturals",
    "lengths",
    "names",
    "numbers",
    "readable",
    "results_file",
    "run",
    "seconds",
    "seed",
    "size",
    "terminable",
    "write_rows",
    "write_text",
]
