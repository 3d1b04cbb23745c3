"""Names of keys: what models say -> Playwright's names, and back.

Slips of every grammar, one rule each:

| slip | rule |
|---|---|
| other spellings: `Page_Down`, `page down`, `PAGEDOWN`, `Return`, `ctrl_l` | case and `_` do not count, nor a blank \
after "page" or "arrow"; the words of X11, pyautogui and browsers are synonyms |
| keys joined: `ctrl + a`, `ctrl+a`, `ctrl-a`, `ctrl a` | blanks, and `+` or `-` between two names, part keys; a `+` \
alone is the key |
| a list in words: `keys=['enter']`, `['ctrl', 'c']`, `"enter"` | `keys=`, brackets and quotes around names fall away |
"""

from __future__ import annotations

import re

from agentkv.envs.actions import MAX_KEYS, MODIFIER_KEYS, NAMED_KEYS
from agentkv.grammars.base import Reject, text_of

# word of a model, lower case, without "_" -> Playwright's name
_WORDS = {name.lower(): name for name in (*MODIFIER_KEYS, *NAMED_KEYS)}
_WORDS |= {"meta": "Meta"} | dict.fromkeys(("cmd", "command", "win", "winleft", "winright", "super", "superl"), "Meta")
_WORDS |= dict.fromkeys(("ctrl", "ctrlleft", "ctrlright", "ctrll", "ctrlr", "controlleft", "controlright"), "Control")
_WORDS |= dict.fromkeys(("controll", "controlr"), "Control")
_WORDS |= dict.fromkeys(("option", "altleft", "altright", "altl", "altr", "optionleft", "optionright"), "Alt")
_WORDS |= dict.fromkeys(("shiftleft", "shiftright", "shiftl", "shiftr"), "Shift")
_WORDS |= {
    "return": "Enter",
    "kpenter": "Enter",
    "esc": "Escape",
    "del": "Delete",
    "ins": "Insert",
    "spacebar": "Space",
}
_WORDS |= {"up": "ArrowUp", "down": "ArrowDown", "left": "ArrowLeft", "right": "ArrowRight"}
_WORDS |= {"uparrow": "ArrowUp", "downarrow": "ArrowDown", "leftarrow": "ArrowLeft", "rightarrow": "ArrowRight"}
_WORDS |= {"pgup": "PageUp", "pgdn": "PageDown", "pagedn": "PageDown", "prior": "PageUp", "next": "PageDown"}
_WORDS |= {"plus": "+", "minus": "-", "equal": "=", "comma": ",", "period": ".", "slash": "/"}
_BLANK = {"\n": "Enter", "\r": "Enter", "\t": "Tab", " ": "Space"}
# what models were taught to say, where a key has several words
_SAID = {
    "Control": "ctrl",
    "Meta": "win",
    "ArrowUp": "up",
    "ArrowDown": "down",
    "ArrowLeft": "left",
    "ArrowRight": "right",
}
_JOINT = re.compile(r"(?<=\S)\s*\+\s*(?=\S)|(?<=\w)-(?=\w)")
_WRAPPER = re.compile(r"\s*(?:keys?\s*=|[\[(]|(['\"])(?=\w))")
_TWO_WORDS = re.compile(r"\b(page|arrow) (?=up|down|left|right)|(?<=up|wn|ft|ht) (?=arrow\b)", re.IGNORECASE)


def key_of(word: str, position: int) -> str:
    """Playwright's name of a key that a model named; raises `Reject` for an unknown one."""
    if len(word) == 1 and "!" <= word <= "~":
        return word
    found = _BLANK.get(word) or _WORDS.get(word[:40].replace("_", "").lower())
    if found is None:
        raise Reject(f"{word[:40]!r} is not a key", position)
    return found


def keys_in(text: str, position: int) -> tuple[str, ...]:
    """The keys of a text like `ctrl + a`; raises `Reject` for an unknown one and for more than `MAX_KEYS`."""
    if text in _BLANK:
        return (_BLANK[text],)
    bare = text if len(text) <= 100 else ""
    wrapper = _WRAPPER.match(bare)
    if wrapper and len(bare) > 1:
        bare = re.sub(r"[\[\]()'\",]", " ", bare[wrapper.end() :])
    words = _JOINT.sub(" ", _TWO_WORDS.sub(r"\1", bare)).split()
    if not 1 <= len(words) <= MAX_KEYS:
        raise Reject(f"{text[:40]!r} does not name 1 to {MAX_KEYS} keys", position)
    return tuple(key_of(word, position) for word in words)


def keys_of(value: object, position: int) -> tuple[str, ...]:
    """The keys of a call's argument: a list of names, or one text."""
    words = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(word, str) for word in words):
        raise Reject("keys is not a list of key names", position)
    found = tuple(key for word in words for key in keys_in(text_of(word, "keys", position), position))
    if not 1 <= len(found) <= MAX_KEYS:
        raise Reject(f"{len(found)} keys were named, not 1 to {MAX_KEYS}", position)
    return found


def word_of(key: str) -> str:
    """The word for one of Playwright's keys. Raises ValueError for a key that no grammar knows."""
    if len(key) == 1 and "!" <= key <= "~":
        return key
    if key not in _WORDS.values():
        raise ValueError(f"{key!r} is not a key of this grammar; use a character or one of {', '.join(NAMED_KEYS)}")
    return _SAID.get(key, key.lower())
