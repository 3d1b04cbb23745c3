"""Web pages as Gymnasium environments: `make("click-tab")` gives a real Chromium page, `task_ids()` says which there
are.

Screenshots and a goal go out, typed actions (`envs.actions`) come in. MiniWoB++ pages carry their bare names, our
own pages that need memory over several screens are called `memory-...`, the tasks on pages that look like the web
(`envs.sites`) `site-...` and `memory-site-...`. `envs.live` opens any address, `envs.oracle` solves the tasks by
script.

This folder is imported as `agentkv.envs`.
"""

from importlib import import_module
from importlib.util import find_spec

if __name__ == "envs":
    import_module("textkv.kernels._bare").alias("envs", "agentkv.envs")
else:
    for _name in ("playwright", "gymnasium", "PIL"):
        if find_spec(_name) is None:
            _told = f"{_name} is missing: browsers and screenshots need pip install 'agentkv[agents]'"
            raise ModuleNotFoundError(_told, name=_name)

    from .browser import Browser
    from .catalogue import CURATED, make, site_ids, task, task_ids
    from .web import WebEnv

    __all__ = ["CURATED", "Browser", "WebEnv", "make", "site_ids", "task", "task_ids"]
