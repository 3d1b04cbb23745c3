"""Who does the jobs of a command: one interface, behind it processes of this machine or Ray."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from textkv.command.arguments import processes
from textkv.command.ray_cluster import LOCAL, cluster
from textkv.command.ray_workers import RayWorkers
from textkv.command.workers import Workers


def add_crew(p: argparse.ArgumentParser, default: int, told: str) -> None:
    """`--workers` and `--ray`; `told`: what each worker has."""
    p.add_argument("--workers", type=processes, default=default, help=f"processes, {told} (default {default})")
    where = "share the work on Ray (extra ray): local, or HOST:PORT of a cluster; a worker that dies is replaced"
    p.add_argument("--ray", type=cluster, metavar="local|HOST:PORT", help=where)


@dataclass(frozen=True)
class Crew:
    """How many work on a command's jobs, and where.

    Attributes:
        workers: their number.
        ray: None = processes of this machine; else `local` or HOST:PORT.
        device: what they compute on, "" and "cpu" without a GPU.

    Raises:
        ValueError: a GPU by its number, where Ray deals them out.
    """

    workers: int = 1
    ray: str | None = None
    device: str = ""

    def __post_init__(self) -> None:
        if self.ray and ":" in self.device:
            raise ValueError(f"--device {self.device} names a GPU, and --ray deals them out; use --device cuda")

    @classmethod
    def of(cls, args: argparse.Namespace) -> Crew:
        """What `add_crew`'s options say, and `--device` where a command has it."""
        return cls(args.workers, args.ray, getattr(args, "device", ""))

    @property
    def alone(self) -> bool:
        """Whether one process does it all, which then may as well be this one."""
        return self.workers == 1 and self.ray is None

    @property
    def elsewhere(self) -> bool:
        """Whether workers may be on other machines, so that paths must not depend on where this process runs."""
        return self.ray not in (None, LOCAL)

    def open(self, open: Callable[..., Any], *args: Any) -> Workers | RayWorkers:
        """The context in which they work; `open(*args)` is called once in each."""
        if self.ray is None:
            return Workers(self.workers, open, *args)
        return RayWorkers(self.workers, self.ray, open, *args, gpu="cuda" in self.device)
