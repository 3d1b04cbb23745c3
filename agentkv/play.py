"""A plan of episodes, played one after the other into a run folder; what is finished there is not played again."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agentkv import envs
from agentkv.agent import EpisodeResult, Limits, Policy, run_episode
from agentkv.envs.browser import Browser, BrowserCrashed
from agentkv.envs.dialogs import Policy as DialogPolicy
from agentkv.envs.live import LiveTask, page_says
from agentkv.envs.tab import Manners
from agentkv.envs.task import Task
from agentkv.envs.web import WebEnv
from agentkv.reading import inside, read_about, read_episode
from agentkv.trace import DOWNLOADS, RUN, EpisodeTrace, episode_folder, write_json

LIVE = "live"  # the name of the task that a --url is
LOAD_TIMEOUT = 30.0  # seconds for a page to load
TRIES = 2  # an episode whose browser dies is played once more
# Two runs may share a folder when these agree: then their figures can stand in one table.
SHARED = ("model", "agent", "budget", "history", "max_steps", "max_new_tokens", "device_scale", "url", "goal", "expect")
SHARED += ("dialogs", "files", "cache")


@dataclass(frozen=True)
class Plan:
    """What is to be played; `history` counts screenshots in a prompt, the current one included.

    `allow`: further origins that the live page `url` may load from; `expect`: what its last page must show;
    `dialogs`: who answers alert, confirm and prompt; `files`: the folder whose files may be uploaded, "" = none;
    `agent`: which prompt and grammar the model has (`agentkv.models.AGENTS`), None = find out. Raises
    ValueError for a number out of range.
    """

    model: str
    methods: tuple[str, ...]
    budget: str
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    history: int = 5
    max_steps: int | None = None
    max_new_tokens: int = 64
    device: str = "cpu"
    device_scale: float = 1.0
    url: str = ""
    goal: str = ""
    allow: tuple[str, ...] = ()
    expect: str = ""
    agent: str | None = None
    dialogs: DialogPolicy = "dismiss"
    files: str = ""
    cache: str = "fresh"

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("episodes=0 plays nothing; use 1 or more")
        if self.history < 1:
            raise ValueError(f"history={self.history} would hide the current screenshot too; use 1 for no earlier ones")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps} plays nothing; use 1 or more")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} leaves no room for an answer; use 64")
        if self.files and not Path(self.files).is_dir():
            raise ValueError(f"files={self.files!r} is no folder; name one with the files that may be uploaded")
        if self.device_scale <= 0:
            raise ValueError(f"device_scale={self.device_scale} is no size; use 1, 2 or 4")

    def episodes(self) -> Iterator[tuple[int, str, str]]:
        """(seed, task, method): every method meets the same problems, and a run cut short is still balanced."""
        return ((s, t, m) for s in self.seeds for t in self.tasks for m in self.methods)


def open_folder(out: Path, plan: Plan, resume: bool, meta: Mapping[str, Any], notes: Sequence[str]) -> None:
    """Make `out` the folder of this run. An earlier run there is moved aside, or with `resume` gone on with.

    Raises ValueError when the run to go on with was made with other settings, is none, or has links out of it.
    """
    about = {**asdict(plan), "episodes": len(plan.seeds), "notes": list(notes), "meta": dict(meta)}
    if (out / RUN).exists():
        if resume:
            about = _joined(read_about(out), about, out)
        else:
            print(f"the earlier run in {out} is now in {_move_aside(out)}", file=sys.stderr)
    for seed, task, method in plan.episodes():
        inside(out, episode_folder(out, method, task, seed))
    write_json(out / RUN, about)


def _joined(old: dict[str, Any], new: dict[str, Any], out: Path) -> dict[str, Any]:
    for name in SHARED:
        if old.get(name, new[name]) != new[name]:  # older runs lack what came later
            raise ValueError(
                f"{out} was played with {name}={old[name]!r}, now it is {new[name]!r}: "
                "--resume needs the same settings; choose another --out"
            )
    for name in ("methods", "tasks", "seeds", "notes"):
        new[name] = list(dict.fromkeys([*old[name], *new[name]]))
    return new | {"episodes": len(new["seeds"])}


def _move_aside(out: Path) -> Path:
    number = 1
    while (aside := out.with_name(f"{out.name}.{number}")).exists():
        number += 1
    return out.rename(aside)


def task_of(name: str, plan: Plan) -> Task:
    """The task of that name, or the plan's live page. Raises ValueError for an unknown name or a bad address."""
    if name != LIVE:
        return envs.task(name, plan.max_steps)
    limit = {} if plan.max_steps is None else {"max_steps": plan.max_steps}
    checker = page_says(plan.expect) if plan.expect else None
    return LiveTask(plan.url, plan.goal, allow=plan.allow, checker=checker, **limit)


def open_env(name: str, plan: Plan, browser: Browser) -> WebEnv:
    """The environment of a task."""
    manners = Manners(plan.dialogs, Path(plan.files).resolve() if plan.files else None)
    return WebEnv(task_of(name, plan), browser, plan.device_scale, load_timeout=LOAD_TIMEOUT, manners=manners)


class Play:
    """Plays `plan` with one policy per method. `budgets` are the figures of the rows: what each method was given;
    `quiet` shows no progress.
    """

    def __init__(
        self,
        plan: Plan,
        policies: Mapping[str, Policy],
        browser: Browser,
        out: Path,
        budgets: Mapping[str, float | str] | None = None,
        quiet: bool = False,
    ) -> None:
        self.plan, self.policies, self.browser, self.out = plan, policies, browser, out
        self.budgets, self.quiet = budgets or {}, quiet
        self.envs: dict[str, WebEnv] = {}

    def run(self) -> None:
        """Play what is not finished yet. Closes the pages, not the browser."""
        try:
            self._all()
        finally:
            for env in self.envs.values():
                env.close()

    def _all(self) -> None:
        todo = [e for e in self.plan.episodes() if not self._done(*e)]
        console = Console(stderr=True, quiet=self.quiet)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            bar = progress.add_task("episodes", total=len(todo))
            for seed, task, method in todo:
                progress.update(bar, description=f"{method} · {task} · {seed}")
                result = self._episode(seed, task, method)
                progress.advance(bar)
                if not console.is_terminal:
                    end = "solved" if result.success else result.stop
                    console.print(f"{method} {task} {seed}: {end} after {result.steps} steps", highlight=False)

    def _folder(self, seed: int, task: str, method: str) -> Path:
        return episode_folder(self.out, method, task, seed)

    def _done(self, *episode: Any) -> bool:
        try:
            return read_episode(self._folder(*episode)) is not None
        except ValueError as error:
            print(f"{error}; it is played again", file=sys.stderr)
            return False

    def _env(self, task: str) -> WebEnv:
        if task not in self.envs:
            self.envs[task] = open_env(task, self.plan, self.browser)
        return self.envs[task]

    def _episode(self, seed: int, task: str, method: str) -> EpisodeResult:
        """One episode into its folder; a browser that dies costs one repetition."""
        about = {"method": method, "budget": self.budgets.get(method, self.plan.budget), "task": task, "seed": seed}
        for crashes in range(TRIES):
            trace = EpisodeTrace(self._folder(seed, task, method), about)
            try:
                result = self._play(self._env(task), method, seed, trace)
                crashed = crashes
            except BrowserCrashed as error:
                print(f"{method} {task} {seed}: {error}", file=sys.stderr)
                result = EpisodeResult(self._env(task).goal, False, 0.0, "browser crash", trace.steps, 0.0)
                crashed = crashes + 1
            finally:
                trace.close()
            if result.stop != "browser crash":
                break
        trace.finish(result, crashed)
        return result

    def _play(self, env: WebEnv, method: str, seed: int, trace: EpisodeTrace) -> EpisodeResult:
        env.manners = replace(env.manners, downloads=trace.folder.resolve() / DOWNLOADS)
        limits, policy = Limits(max_steps=env.max_steps), self.policies[method]
        return run_episode(env, policy, seed, limits, self.plan.history, trace.step)
