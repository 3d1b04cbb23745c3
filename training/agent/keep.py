"""Put the best weights of a running training in place: `python -m training.agent.keep --minutes 40`.

Every few minutes the trainer's latest export is copied, played on evaluation seeds, and moved to the package's
`weights` folder, file by file and atomically, if it solves more than what lies there. The figures go into the
folder's README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from agentkv.envs.browser import Browser
from agentkv.errors import EXPLAINED
from agentkv.models import MINI, load_adapter
from agentkv.run import DEFAULT_TASKS
from textkv.command import episodes, positive, run, some_text
from training.agent.evaluate import FIRST_SEED, mean, measure
from training.agent.tasks import MEMORY, TASKS
from training.keep import Rows, consider, recorded


def readme(rows: Rows, trained: dict[str, Any]) -> str:
    """The README of the weights: what they are, their seed and data, and what was measured."""
    steps, seconds = (trained[name] + trained["before"][name] for name in ("step", "seconds"))
    lines = [
        "# The embedded mini GUI-agent model",
        "",
        "Qwen2.5-VL architecture, trained from scratch by `python -m training.agent.train` on drawn pages and on",
        "oracle episodes of the pages below at seeds under 1,000,000 (`python -m training.agent.collect`).",
        f"Optimizer steps {steps}, {seconds / 60:.0f} minutes on two CPU cores.",
        "",
        f"Greedy, full cache, seeds from {FIRST_SEED:,} on (`python -m training.agent.evaluate`):",
        "",
        "| task | episodes | success | 95 % |",
        "|---|---|---|---|",
    ]
    seeing = [row for row in rows if row["history"] > 1]
    lines += [f"| {r['task']} | {r['n']} | {r['success']:.2f} | {r['low']:.2f}-{r['high']:.2f} |" for r in seeing]
    memory = [row for row in seeing if row["task"] in MEMORY]
    web = [row for row in seeing if row["task"] not in MEMORY]
    default = [row for row in web if row["task"] in DEFAULT_TASKS]
    lines += [
        "",
        f"Mean over all {len(web)} MiniWoB++ tasks {mean(web):.2f}, over the {len(default)} that `agentkv.run` plays",
        f"by default {mean(default):.2f}, over the {len(memory)} memory pages {mean(memory):.2f}; over these without",
        f"the earlier screenshots {mean([row for row in rows if row['history'] == 1]):.2f}: they cannot be guessed.",
        "",
    ]
    return "\n".join(lines)


def played(browser: Browser, episodes: int) -> Callable[[Path], tuple[float, Rows]]:
    """Mean success of a model folder; the rows have the memory pages also without earlier screenshots."""

    def score(folder: Path) -> tuple[float, Rows]:
        adapter = load_adapter(folder)
        rows = measure(adapter, browser, TASKS, episodes, adapter.history_frames)
        return mean(rows), [*rows, *measure(adapter, browser, MEMORY, episodes, 1)]

    return score


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m training.agent.keep", description=__doc__.split("\n\n")[0])
    p.add_argument("--latest", type=some_text, default="runs/mini/latest", help="what a training exports to")
    p.add_argument("--minutes", type=positive, default=40.0, help="until it ends (40)")
    p.add_argument("--every", type=positive, default=8.0, help="minutes from one measurement to the next")
    p.add_argument("--episodes", type=episodes, default=8, help="per task")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("training.agent.keep", parser(), work, argv, explained=EXPLAINED)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Watch until the time is over."""
    torch.set_num_threads(1)
    begin, seen, latest = time.monotonic(), 0.0, Path(args.latest)
    with Browser() as browser:
        while time.monotonic() - begin < args.minutes * 60:
            start, weights = time.monotonic(), latest / "model.safetensors"
            if weights.is_file() and weights.stat().st_mtime > seen:
                seen = weights.stat().st_mtime
                success = consider(latest, MINI, played(browser, args.episodes), readme)
                print(f"{(start - begin) / 60:.0f} min: {success:.3f}, in place {recorded(MINI):.3f}", flush=True)
            time.sleep(max(5.0, args.every * 60 - (time.monotonic() - start)))


if __name__ == "__main__":
    sys.exit(main())
