"""What Chromium shows outside of the page's own picture, drawn inside it: lists, calendars, colours, form complaints.

The scripts of this folder run in a world of their own in every frame of a page. Chromium opens its popup as it does for
a person (by mouse, by keys, by `showPicker()`); they notice it by `:open`, close it and draw theirs in the same place.
What is chosen there goes into the control with `input` and `change`, as Chromium does it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from playwright.sync_api import CDPSession

WORLD = "agentkv"
BINDING = "agentkvHear"
_PARTS = ("stage", "lists", "dates", "colours", "keys", "events")
_FOLDER = Path(str(files("agentkv.envs"))) / "pickers"


@cache
def script() -> str:
    """The parts as one script, with names of its own."""
    parts = ((_FOLDER / f"{name}.js").read_text(encoding="utf-8") for name in _PARTS)
    return "(() => {\n" + "\n".join(parts).replace("BINDING", BINDING) + "\n})();"


def install(session: CDPSession, hear: Callable[[dict[str, Any]], None]) -> None:
    """Draw pickers in the page of `session`.

    `hear` gets {"keys": [...]} for keys that the page left to the browser, {"coming": "file" or "tab"} when that was
    asked for, {"invalid": text, "field": name} for a form that was not sent.
    """

    def called(event: dict[str, Any]) -> None:
        if event["name"] == BINDING:
            hear(json.loads(event["payload"]))

    session.on("Runtime.bindingCalled", called)
    session.send("Runtime.enable")
    session.send("Page.enable")
    session.send("Runtime.addBinding", {"name": BINDING, "executionContextName": WORLD})
    once = {"source": script(), "worldName": WORLD, "runImmediately": True}
    session.send("Page.addScriptToEvaluateOnNewDocument", once)
