"""Recorded GUI tasks answered offline by Ray Data: a table of tasks goes in, a table of answers comes out.

    python examples/ray_data.py --data DIR [--workers 2] [--out answers.parquet]

DIR is a folder in AgentNetBench's layout. `python -m eval.agentnetbench --ray local` does the same and scores the
answers; this is the form for pipelines that read their tasks from a table and write answers to one. Prints how many
steps each cache answered and how many of the replies could be read. Needs the extra ray.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from agentkv.eval.agentnetbench.bench import MAX_NEW_TOKENS, TEACHER, Cell
from agentkv.eval.agentnetbench.records import read
from agentkv.eval.agentnetbench.sharing import Worker
from agentkv.play import Plan
from textkv.command.ray_cluster import connected

CELLS = [Cell("full", "1", 2), Cell("gui-kv", "0.4", 2)]


class Answering:
    """What each worker of Ray Data holds: the model and the tasks; a batch is a few of their numbers."""

    def __init__(self, plan: Plan, folder: str, tokens: int) -> None:
        tasks, _ = read(Path(folder))
        self.worker = Worker(plan, tasks, CELLS, TEACHER, tokens)

    def __call__(self, batch: dict) -> dict:
        """All answers to the tasks of a batch, a row each."""
        asked = [(int(number), cell) for number in batch["task"] for cell in CELLS]
        found = [one for number, cell in asked for one in self.worker.answers(number, cell, ())]
        rows = [{"method": x.method, "task": x.task, "step": x.step, "text": x.text, "error": x.error} for x in found]
        return {name: [row[name] for row in rows] for name in rows[0]} | {
            "figures": [json.dumps(x.figures) for x in found]
        }


def main() -> None:
    """Answer, count, and write the answers where `--out` says."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--model", default="mini")
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS)
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    tasks, problems = read(args.data)
    print(*problems, sep="\n", end="\n" * bool(problems))
    plan = Plan(args.model, (), "1", (), (0,))
    # One processor more than workers: Ray Data reads and gathers beside them.
    with connected("local", args.workers + 1) as ray:
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = False
        answers = ray.data.from_items([{"task": number} for number in range(len(tasks))]).map_batches(
            Answering,
            fn_constructor_args=(plan, str(args.data.absolute()), args.max_new_tokens),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=args.workers),
            num_cpus=1,
        )
        found = answers.to_pandas().sort_values(["task", "method", "step"])
    for method, mine in found.groupby("method"):
        print(f"{method}: {len(mine)} steps answered, {int((mine['error'] == '').sum())} replies could be read")
    if args.out:
        found.to_parquet(args.out)


if __name__ == "__main__":
    main()
