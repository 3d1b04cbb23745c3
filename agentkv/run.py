"""`python -m agentkv.run`: a GUI agent plays web tasks with one cache method or several, side by side on the same seeds.

Everything that can be wrong with the request (method, task, budget, model folder, browser, disk) is checked before any
work; such an error is one line on stderr and exit code 2. The run is a folder of traces (`agentkv.trace`); the table,
`summary.json` and `report.html` are drawn from them, so an interrupted run resumes and loses no finished episode.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import envs
import envs.live
from agentkv import gui_kv, tables  # noqa: F401  gui_kv registers its methods
from agentkv.agent import Agent, EpisodeResult, Limits, Policy, run_episode
from agentkv.errors import Interrupts, UserError, user_errors
from agentkv.meta import run_meta
from agentkv.models import load_adapter
from agentkv.replay import replay
from agentkv.report import write_report
from agentkv.stats import UNITS, summarise
from agentkv.trace import DONE, RUN, EpisodeTrace, episode_folder, need_space, read_run, write_json
from envs.browser import Browser, BrowserCrashed, find_chromium
from textkv import Budget, resolve_method

EVALUATION_SEEDS = 1_000_000  # training uses the seeds below
REPORT_BYTES = 20_000_000
STEPS_GUESSED = 10  # per episode, to guess the space that the screenshots take
LIVE_VIEWPORT = (1280, 720)


@dataclass(frozen=True)
class Plan:
    """What is to be played. Two runs with the same plan (methods, tasks and seeds aside) may share a folder."""

    model: str
    methods: tuple[str, ...]
    budget: str
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    history: int
    max_steps: int | None
    max_new_tokens: int
    device: str
    device_scale: float
    url: str
    goal: str

    def episodes(self) -> Iterator[tuple[int, str, str]]:
        """(seed, task, method): every method meets the same problems, and a run cut short is still balanced."""
        return ((s, t, m) for s in self.seeds for t in self.tasks for m in self.methods)
