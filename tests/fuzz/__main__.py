"""`python -m tests.fuzz --inputs 1000000`: random input for all that reads a person, a model or a file.

Each reader gets its share of the inputs, near right ones and far from them. It may accept one, or refuse it with the
error that it promises. For each reader a line: inputs, accepted, refused, other exceptions, and the slowest input.
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
from typing import Any

from textkv.command import count, names, results_file, run, seed, write_rows
from textkv.provenance import run_meta

from .targets import Target, one_line, opened

LIMIT = 5.0  # seconds of processor time for one input; a sweep of the garbage collector takes less
SHOWN = 10


def fuzz(target: Target, inputs: int, first: int) -> dict[str, Any]:
    """A report of `inputs` inputs; the same `first` seed gives the same ones."""
    done = accepted = refused = 0
    slowest, raised = 0.0, []
    begin = time.perf_counter()
    while done < inputs:
        number = f"{target.name}/{first}/{done}"
        made = target.make(random.Random(number))
        done += target.batch
        start = time.process_time()
        try:
            target.read(made)
            accepted += target.batch
        except target.promised as error:
            refused += target.batch
            one_line(error)
        except Exception as error:
            where = traceback.format_exc(limit=-3)
            if len(raised) < SHOWN and where not in (other["trace"] for other in raised):
                raised.append({"input": number, "error": repr(error)[:200], "trace": where, "made": repr(made)[:300]})
            elif len(raised) == SHOWN:
                break
        slowest = max(slowest, time.process_time() - start)
    seconds = time.perf_counter() - begin
    about = {"reader": target.name, "inputs": done, "accepted": accepted, "refused": refused}
    return about | {"other": len(raised), "slowest": round(slowest, 3), "seconds": round(seconds, 1), "raised": raised}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n\n")[0])
    p.add_argument("--inputs", type=count, default=1_000_000, help="in total (default 1000000)")
    p.add_argument("--only", type=names, default=[], help="comma-separated readers (default: all)")
    p.add_argument("--seed", type=seed, default=0, help="first seed; the same one gives the same inputs (0)")
    p.add_argument("--json", type=results_file("tests.fuzz"), help="write the figures here too")
    return p


def work(args: argparse.Namespace, argv: list[str]) -> int:
    """Fuzz; 1 if anything but the promised was raised."""
    warnings.simplefilter("ignore")
    known = {kind.__name__: kind for kind in Target.__subclasses__()}
    chosen = [kind for name, kind in known.items() if name in (args.only or known)]
    unknown = [name for name in args.only if name not in known]
    if unknown:
        raise ValueError(f"there is no reader {unknown[0]!r}; use {', '.join(known)}")
    rows: list[dict[str, Any]] = []
    for kind in chosen:
        with opened(kind) as target:
            row = fuzz(target, round(args.inputs * kind.share / sum(one.share for one in chosen)), args.seed)
        for one in row["raised"]:
            print(f"{one['input']}: {one['error']}\n  {one['made']}\n{one['trace']}", file=sys.stderr)
        rows.append(row | {"raised": [one["error"] for one in row["raised"]]})
        print(json.dumps(rows[-1]), flush=True)
    total = {name: sum(row[name] for row in rows) for name in ("inputs", "accepted", "refused", "other")}
    print(json.dumps({"reader": "all"} | total))
    write_rows(args.json, run_meta("tests.fuzz", argv, args.seed), rows)
    return int(total["other"] > 0 or any(row["slowest"] > LIMIT for row in rows))


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("tests.fuzz", parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
