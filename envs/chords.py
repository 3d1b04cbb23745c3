"""Keys that belong to the browser, not to the page: what they do here, or why they cannot do it."""

from __future__ import annotations

_DOES = {
    "Control+r": "reload",
    "Control+Shift+R": "reload",
    "F5": "reload",
    "Control+F5": "reload",
    "Shift+F5": "reload",
    "Alt+ArrowLeft": "back",
    "Alt+ArrowRight": "forward",
    "Control+w": "close",
    "Control+F4": "close",
    "Control+Tab": "next",
    "Control+PageDown": "next",
    "Control+Shift+Tab": "previous",
    "Control+PageUp": "previous",
    **{f"Control+{n}": f"tab {n}" for n in range(1, 10)},
}
_CANNOT = {
    "open an empty tab": ("Control+t", "Control+n", "Control+Shift+N", "Control+Shift+T"),
    "show an address bar": ("Control+l", "Alt+d", "F6", "Control+k", "Control+e"),
    "search in the page": ("Control+f", "Control+g", "Control+Shift+G", "F3"),
    "print": ("Control+p",),
    "save the page": ("Control+s",),
    "open a file of the machine": ("Control+o",),
    "keep bookmarks or a list of downloads": ("Control+d", "Control+h", "Control+j", "Control+Shift+O"),
    "show the developer's tools": ("F12", "Control+u", "Control+Shift+I", "Control+Shift+J", "Control+Shift+C"),
    "zoom": ("Control++", "Control+=", "Control+-", "Control+0", "Control+wheel"),
    "change its window": ("F11", "Alt+F4", "Control+Shift+W", "Control+q"),
    "show a start page": ("Alt+Home",),
    "delete what it remembers": ("Control+Shift+Delete",),
}
_WHY = {chord: why for why, chords in _CANNOT.items() for chord in chords}


def meaning(keys: list[str]) -> tuple[str, str]:
    """(what the browser does, why it does nothing): one of them is "", both for keys that mean nothing to a browser.

    What it does: reload, back, forward, close, next, previous, "tab N".
    """
    chord = "+".join(keys)
    return _DOES.get(chord, ""), (f"{chord} did nothing: this browser cannot {_WHY[chord]}" if chord in _WHY else "")
