"""Who does the jobs of a command: one interface, behind it processes of this machine or Ray."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from textkv.command.arguments import processes
from textkv.command.ray_cluster import LOCAL, cluster
from textkv.command.ray_shared import Ask, shared
from textkv.command.ray_workers import RayWorkers
from textkv.command.workers import Workers


def add_crew(p: argparse.ArgumentParser, default: int, told: str, models: bool = False) -> None:
    """`--workers` and `--ray`; `told`: what each worker has. `models`: also `--models` and `--rows`, for commands whose
    workers can share those.
    """
    p.add_argument("--workers", type=processes, default=default, help=f"processes, {told} (default {default})")
    where = "share the work on Ray (extra ray): local, or HOST:PORT of a cluster; a worker that dies is replaced"
    p.add_argument("--ray", type=cluster, metavar="local|HOST:PORT", help=where)
    if models:
        what = "with --ray: so many models, which the workers share (default: each has its own)"
        p.add_argument("--models", type=processes, help=what)
        p.add_argument("--rows", type=processes, help="with --models: prompts that a model reads together (1)")


@dataclass(frozen=True)
class Crew:
    """How many work on a command's jobs, and where.

    Attributes:
        workers: their number.
        ray: None = processes of this machine; else `local` or HOST:PORT.
        device: what they compute on, "" and "cpu" without a GPU.
        models: so many are shared by the workers; None = each has its own.
        rows: prompts that a shared model reads together at most; None = 1.

    Raises:
        ValueError: a GPU by its number, where Ray deals them out; shared models without Ray, rows without those.
    """

    workers: int = 1
    ray: str | None = None
    device: str = ""
    models: int | None = None
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.models and not self.ray:
            raise ValueError(f"--models {self.models} are shared on Ray; give --ray local, or leave the option out")
        if self.rows and not self.models:
            raise ValueError(f"--rows {self.rows} are read by models that workers share; give --models 1")
        if self.ray and ":" in self.device:
            raise ValueError(f"--device {self.device} names a GPU, and --ray deals them out; use --device cuda")

    @classmethod
    def of(cls, args: argparse.Namespace) -> Crew:
        """What `add_crew`'s options say, and `--device` where a command has it."""
        told = (getattr(args, name, None) for name in ("models", "rows"))
        return cls(args.workers, args.ray, getattr(args, "device", ""), *told)

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
        # A GPU is for those who hold a model.
        return RayWorkers(self.workers, self.ray, open, *args, gpu="cuda" in self.device and not self.models)

    @contextmanager
    def sharing(self, open: Callable[..., Any], *args: Any) -> Iterator[Ask | None]:
        """A context in which `open(*args)`, a `textkv.command.desk.Able`, is there for all workers: what they ask it
        through; None if each is to have its own.
        """
        if not self.models:
            yield None
            return
        gpu = "cuda" in self.device
        with shared(self.models, self.ray, self.workers, open, *args, rows=self.rows or 1, gpu=gpu) as ask:
            yield ask
