"""Which tasks there are, and an environment for each."""

from __future__ import annotations

import difflib
from typing import Any

from . import memory, miniwob
from .browser import Browser
from .sites import SITES, SiteTask
from .task import Task
from .web import WebEnv

CURATED = (
    "click-test",
    "click-test-2",
    "click-button",
    "click-button-sequence",
    "click-tab",
    "click-tab-2",
    "click-link",
    "click-dialog",
    "click-dialog-2",
    "click-color",
    "click-shape",
    "click-widget",
    "click-option",
    "click-checkboxes",
    "click-checkboxes-transfer",
    "click-collapsible",
    "count-shape",
    "identify-shape",
    "grid-coordinate",
    "focus-text",
    "focus-text-2",
    "enter-text",
    "enter-text-2",
    "enter-text-dynamic",
    "enter-password",
    "login-user",
    "simple-arithmetic",
    "simple-algebra",
)


def task_ids(everything: bool = False) -> list[str]:
    """Names for `make`: our memory pages and the curated MiniWoB tasks; `everything` adds all pages of the miniwob
    package and the tasks on sites.
    """
    first = [*memory.PAGES, *CURATED]
    if not everything:
        return first
    return first + [name for name in miniwob.page_ids() if name not in CURATED] + site_ids()


def site_ids() -> list[str]:
    """Names for `make` of the tasks on pages that look like the web (`python -m envs.sites install` fetches these)."""
    return list(SITES)


def task(task_id: str, max_steps: int | None = None) -> Task:
    """The task of that name. Raises ValueError with near matches for an unknown one, `MiniwobMissing` or
    `SitesMissing` without its pages.
    """
    if task_id in memory.PAGES:
        return memory.MemoryTask(task_id, max_steps)
    if task_id in SITES:
        return SiteTask(task_id, SITES[task_id], max_steps)
    known = [*memory.PAGES, *SITES, *miniwob.page_ids()]
    if task_id not in known:
        near = difflib.get_close_matches(task_id, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see envs.task_ids(everything=True)"
        raise ValueError(f"there is no task {task_id!r}; {hint}")
    return miniwob.MiniwobTask(task_id, max_steps) if max_steps else miniwob.MiniwobTask(task_id)


def make(
    task_id: str,
    browser: Browser | None = None,
    device_scale: float = 1.0,
    max_steps: int | None = None,
    **options: Any,
) -> WebEnv:
    """An environment for `task_id`; `options` go to `WebEnv` (time-outs). Share one `browser` between environments."""
    return WebEnv(task(task_id, max_steps), browser, device_scale, **options)
