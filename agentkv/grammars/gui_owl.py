"""GUI-Owl-1.5: a line `Action: ...` and a call of `computer_use` (or `mobile_use`) <-> typed actions; points 0 to 1000.

The client reads calls with Python's syntax, so that single-quoted dicts occur (`calls` reads them). A call of
`browser_use` names elements by numbers that its client draws into the screenshot; this runner draws none, so such a
call is refused by name.
"""

from __future__ import annotations

from agentkv.grammars.base import Reject
from agentkv.grammars.tool_call import Dialect, say_held
from agentkv.grammars.tools import COMPUTER, MOBILE, Actions, Call, Table


def _labelled(call: Call) -> Actions:
    raise Reject("browser_use points at labels drawn on the screenshot, and none are drawn here", call.at)


_LABELS = ("click", "type", "scroll", "select", "wait", "go_back", "wikipedia", "answer")
BROWSER: Table = {name: (("label", "content", "direction", "text", "time", "url"), _labelled) for name in _LABELS}
LEAD = "Action: Do the next step.\n"
GRAMMAR = Dialect(
    "GUI-Owl", {"computer_use": COMPUTER, "mobile_use": MOBILE, "browser_use": BROWSER}, say_held, lead=LEAD
).grammar()
