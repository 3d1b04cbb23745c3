"""Web pages as Gymnasium environments: `make("click-tab")` gives a real Chromium page, `task_ids()` says which there
are.

Screenshots and a goal go out, typed actions (`envs.actions`) come in. MiniWoB++ pages carry their bare names, our
own pages that need memory over several screens are called `memory-...`; `envs.live` opens any address, `envs.oracle`
solves the tasks by script.

This folder is imported as `agentkv.envs`.
"""

from agentkv.envs.browser import Browser
from agentkv.envs.catalogue import CURATED, make, task, task_ids
from agentkv.envs.web import WebEnv

__all__ = ["CURATED", "Browser", "WebEnv", "make", "task", "task_ids"]
