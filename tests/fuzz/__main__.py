"""`python -m tests.fuzz --inputs 1000000`: random input for all that reads a person, a model or a file.

Each reader gets its share of the inputs, near right ones and far from them. It may accept one, or refuse it with the
error that it promises. For each reader a line: inputs, accepted, refused, other exceptions, processor time, and the
slowest input. With --json the figures are written as they come, and --resume goes on with them.
Exit code 1 for any other exception, or an input that took longer than the limit.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from textkv.command import count, names, results_file, run, seed, write_rows
from textkv.provenance import run_meta
from textkv.records import read_results

from .files import Files
from .targets import Target, one_line, opened

READERS = {kind.__name__: kind for kind in dict.fromkeys([*Target.__subclasses__(), Files])}
"""All of them, by name."""

LIMIT = 5.0  # seconds of processor time for one input; a sweep of the garbage collector takes less
SHOWN = 10  # exceptions after which a reader is left
PIECE = 5_000  # inputs after which the figures are written


def fuzz(target: Target, inputs: int, first: int, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """A report of `inputs` inputs; the same `first` seed gives the same ones. `known` is the report of the first of
    them, which is gone on with.
    """
    report = known or {"reader": target.name, "inputs": 0, "accepted": 0, "refused": 0, "other": 0, "slowest": 0.0,
                       "slowest_input": "", "seconds": 0.0, "raised": []}  # fmt: skip
    begin = time.process_time()
    while report["inputs"] < inputs and report["other"] < SHOWN:
        number = f"{target.name}/{first}/{report['inputs']}"
        made = target.make(random.Random(number))
        report["inputs"] += target.batch
        start = time.process_time()
        try:
            target.read(made)
            report["accepted"] += target.batch
        except target.promised as error:
            report["refused"] += target.batch
            one_line(error)
        except Exception as error:
            where = traceback.format_exc(limit=-3)
            if where not in (other["trace"] for other in report["raised"]):
                report["other"] += 1
                about = {"input": number, "error": repr(error)[:200], "trace": where, "made": repr(made)[:300]}
                report["raised"].append(about)
        took = time.process_time() - start
        if took > report["slowest"]:
            report["slowest"], report["slowest_input"] = round(took, 3), number
    report["seconds"] = round(report["seconds"] + time.process_time() - begin, 1)
    return report


def begun(path: Path | None, first: int) -> dict[str, dict[str, Any]]:
    """Reports by reader from the file of an earlier start with the same seed; those that found nothing to mend."""
    if path is None or not path.is_file():
        return {}
    meta, rows = read_results(path)
    if meta.get("seed") != first:
        raise ValueError(f"{path} is of seed {meta.get('seed')}, not {first}; give another --json, or that --seed")
    return {row["reader"]: row for row in rows if not row["raised"]}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n\n")[0])
    p.add_argument("--inputs", type=count, default=1_000_000, help="in total (default 1000000)")
    p.add_argument("--only", type=names, default=[], help="comma-separated readers (default: all)")
    p.add_argument("--seed", type=seed, default=0, help="first seed; the same one gives the same inputs (0)")
    p.add_argument("--json", type=results_file("tests.fuzz"), help="write the figures here too, as they come")
    p.add_argument("--resume", action="store_true", help="go on with the readers and inputs that --json does not hold")
    return p


def work(args: argparse.Namespace, argv: list[str]) -> int:
    """Fuzz; 1 if anything but the promised was raised."""
    warnings.simplefilter("ignore")
    chosen = [kind for name, kind in READERS.items() if name in (args.only or READERS)]
    unknown = [name for name in args.only if name not in READERS]
    if unknown:
        raise ValueError(f"there is no reader {unknown[0]!r}; use {', '.join(READERS)}")
    known_rows = begun(args.json, args.seed) if args.resume else {}
    meta, rows = run_meta("tests.fuzz", argv, args.seed), []
    for kind in chosen:
        wanted, row = round(args.inputs * kind.share / sum(one.share for one in chosen)), known_rows.get(kind.__name__)
        rows.append(row or {})
        with opened(kind) as target:
            while row is None or (row["inputs"] < wanted and row["other"] < SHOWN):
                row = fuzz(target, min((row or {"inputs": 0})["inputs"] + PIECE, wanted), args.seed, row)
                rows[-1] = row | {"raised": [one["error"] for one in row["raised"]]}
                write_rows(args.json, meta, rows)
        for one in row["raised"]:
            print(f"{one['input']}: {one['error']}\n  {one['made']}\n{one['trace']}", file=sys.stderr)
        print(json.dumps(rows[-1]), flush=True)
    total = {name: sum(row[name] for row in rows) for name in ("inputs", "accepted", "refused", "other")}
    print(json.dumps({"reader": "all"} | total))
    write_rows(args.json, meta, rows)
    return int(total["other"] > 0 or any(row["slowest"] > LIMIT for row in rows))


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("tests.fuzz", parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
