"""Recorded GUI tasks answered offline by Ray Data: a table of tasks goes in, a table of answers comes out.

    python examples/ray_data.py --data DIR [--workers 2] [--out answers.parquet]

DIR is a folder in AgentNetBench's layout. `python -m eval.agentnetbench --ray local` does the same and scores the
answers; this is the form for pipelines that go from table to table. Prints how many steps each cache answered and how
many of the replies could be read. Needs the extra ray.
"""

import argparse
import logging
from pathlib import Path

import pandas as pd

from agentkv.eval.agentnetbench.bench import TEACHER, Cell
from agentkv.eval.agentnetbench.records import read
from agentkv.eval.agentnetbench.sharing import Worker
from agentkv.play import Plan
from textkv.command.ray_cluster import connected

CELLS = [Cell("full", "1", 2), Cell("gui-kv", "0.4", 2)]


class Answering:
    """What each worker of Ray Data holds: the model and the tasks; a batch is a few of their numbers."""

    def __init__(self, model: str, folder: Path, tokens: int) -> None:
        self.worker = Worker(Plan(model, (), "1", (), (0,)), None, read(folder)[0], CELLS, TEACHER, tokens)

    def __call__(self, batch: dict) -> pd.DataFrame:
        """All answers to the tasks of a batch, a row each."""
        asked = [(int(number), cell) for number in batch["task"] for cell in CELLS]
        found = [one for number, cell in asked for one in self.worker.answers(number, cell, ())]
        return pd.DataFrame([vars(one) for one in found])[["method", "task", "step", "text", "error"]]


p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
p.add_argument("--data", type=Path, required=True)
p.add_argument("--model", default="mini")
p.add_argument("--workers", type=int, default=2)
p.add_argument("--max-new-tokens", type=int, default=256)
p.add_argument("--out", type=Path)
args = p.parse_args()

# One processor more than workers: Ray Data gathers beside them.
with connected("local", args.workers + 1) as ray:
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    tasks = ray.data.from_items([{"task": number} for number in range(len(read(args.data)[0]))])
    how = {"compute": ray.data.ActorPoolStrategy(size=args.workers), "num_cpus": 1, "batch_size": 1}
    given = (args.model, args.data.absolute(), args.max_new_tokens)
    answers = tasks.map_batches(Answering, fn_constructor_args=given, **how).to_pandas()
for method, mine in answers.groupby("method"):
    print(f"{method}: {len(mine)} steps answered, {(mine['error'] == '').sum()} replies could be read")
if args.out:
    answers.sort_values(["task", "method", "step"]).to_parquet(args.out, index=False)
