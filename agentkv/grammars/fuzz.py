"""Throws random and mutated replies at the grammars: `python -m agentkv.grammars.fuzz --count 200000 --grammar all`.

Replies are pieces of the grammars and characters at random, mutations of rendered actions and of the corpus, and now
and then a piece repeated up to the length limit. For each grammar one JSON line: how many were actions, the errors by
reason (names and numbers left out), the slowest reading in milliseconds of processor time; with --json their counts are
written as each grammar ends. Exit code 1 if one raised an exception or took longer than the limit.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from typing import Any

from agentkv.envs import actions as acts
from agentkv.grammars import evocua, fara, gui_owl, holo, mai_ui, opencua, tool_call, ui_tars
from agentkv.grammars.base import MAX_REPLY, CoordinateSpace, Frame, Grammar, ParseError
from agentkv.grammars.corpus import REFUSED
from textkv.command import count, results_file, run, seed, write_rows
from textkv.provenance import run_meta

GRAMMARS: dict[str, Grammar] = {
    "ui_tars": ui_tars.GRAMMAR,
    "opencua": opencua.GRAMMAR,
    "tool_call": tool_call.GRAMMAR,
    "tool_call_xml": tool_call.XML,
    "gui_owl": gui_owl.GRAMMAR,
    "evocua_s1": evocua.S1,
    "evocua_s2": evocua.S2,
    "mai_ui": mai_ui.GRAMMAR,
    "fara": fara.GRAMMAR,
    "holo": holo.GRAMMAR,
}
LIMIT_MS = 50.0
FRAMES = [Frame((1280, 720), (1288, 728), space=space) for space in CoordinateSpace]
_PIECES = r"""Action: Thought: click type hotkey key= content= start_box= ' " ( ) [ ] { } , : = \ \n \u0041 <think>
</think> <|box_start|> <point> pyautogui.click pyautogui.write pyautogui.hotkey pyautogui.scroll computer.terminate
time.sleep import lambda f' b" \"\"\" ``` ```python # ; . - + * ** // 0x 1e9 9999 -1 0.5 1 nan NaN inf True None x y
<tool_call> </tool_call> {"name": "computer_use" "arguments": "action": "left_click" "coordinate": [1,2] null é ٣ １
"action": "type" "text": "keys": ["keys=['enter']"] {'name': "mobile_use" "swipe" "note": "thought":
<function=computer_use> <parameter=action> </parameter> </function>
<thinking> </thinking> <answer> "x": 1 "url": "https://a.org" Action：
""".split()
_PIECES += ["\n", "\n\n", " ", "\t", "\r", "\0", "\x0c", "\u2028", "\ud800", "'''", '"""']


def some_action(rng: random.Random) -> acts.Action:
    """Any typed action, with values inside a page of 1280 x 720."""
    x, y, to_x, to_y = (rng.uniform(0, size) for size in (1280, 720, 1280, 720))
    text = "".join(rng.choice(_PIECES) for _ in range(rng.randint(0, 6)))
    key = rng.choice(("Control", "Shift", "Enter", "ArrowUp", "F5", "Space", "a", "'", "\\", "+"))
    here = rng.random() < 0.3
    pointed: list[type[Any]] = [acts.Click, acts.DoubleClick, acts.RightClick, acts.MiddleClick, acts.TripleClick]
    return rng.choice(
        [
            rng.choice([*pointed, acts.LongPress, acts.Move])(x, y),
            acts.Drag(None if here else x, None if here else y, to_x, to_y),
            acts.Scroll(None if here else x, None if here else y, rng.choice(("up", "down", "left", "right"))),
            acts.Type(text),
            acts.Hotkey((key, "b")[: rng.randint(1, 2)]),
            rng.choice([acts.KeyDown, acts.KeyUp])(key),
            rng.choice([acts.PressBack(), acts.PressHome(), acts.OpenApp(text), acts.CallUser(text), acts.Wait(2.5)]),
            rng.choice([acts.Goto("https://a.org/" + key), acts.Reload(), acts.Note(text), acts.Click()]),
            acts.Several((acts.Click(x, y), acts.Type(text + "\n"))),
            acts.Finished(text),
        ]
    )


def _rendered(grammar: Grammar, frame: Frame, rng: random.Random) -> str:
    while True:
        try:
            return grammar.render(some_action(rng), frame)
        except ValueError:  # the grammar cannot say it
            continue


def _noise(rng: random.Random) -> str:
    return "".join(
        rng.choice(_PIECES) if rng.random() < 0.7 else chr(rng.randrange(1, 0x3100)) for _ in range(rng.randint(0, 30))
    )


def mutated(text: str, rng: random.Random) -> str:
    """`text` after up to three small edits: a piece put in, put over or doubled, some characters out, the end cut."""
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        a = rng.randint(0, len(text))
        b = a + rng.randint(1, 4)
        piece = rng.choice(_PIECES)
        edits = (text[:a] + piece + text[a:], text[:a] + text[b:], text[:b] + text[a:], text[:a] + piece + text[b:])
        text = text[:a] if rng.random() < 0.05 else rng.choice(edits)
    return text


def reply(name: str, frame: Frame, rng: random.Random) -> str:
    """One reply to throw at the grammar `name`, with points mostly in the numbers of `frame`."""
    kind = rng.random()
    if kind < 0.15:
        return _noise(rng)
    if kind < 0.75:
        return mutated(_rendered(GRAMMARS[name], frame, rng), rng)
    if kind < 0.755:
        unit = _noise(rng)[:20] or "("
        opening = _rendered(GRAMMARS[name], frame, rng)
        opening = opening[: rng.randint(0, len(opening))]
        return (opening + unit * (MAX_REPLY // len(unit)))[:MAX_REPLY]
    rows = REFUSED[name if name in REFUSED and rng.random() < 0.8 else rng.choice(list(REFUSED))]
    text = rng.choice(rows)[0]
    return mutated(text if len(text) < 2000 or rng.random() < 0.02 else text[:300], rng)


def reason_class(reason: str) -> str:
    """A reason without what varies: everything between the first and the last quote, and numbers."""
    bare = re.sub(r"['\"].*['\"]", "...", reason.split("; ")[0], flags=re.DOTALL)
    return re.sub(r"-?\b\d[\w.+-]*", "N", bare)


def _timed(grammar: Grammar, text: str, frame: Frame) -> tuple[float, Any]:
    """The slower of `parse` and `parse_all` in milliseconds, and what `parse` found."""
    start = time.process_time()
    found = grammar.parse(text, frame)
    between = time.process_time()
    grammar.parse_all(text, frame)
    return 1000 * max(between - start, time.process_time() - between), found


def fuzz(name: str, count: int, seed: int) -> dict[str, Any]:
    """`count` replies through one grammar; the report of the module docstring, with `exceptions` as texts."""
    rng = random.Random(f"{name}/{seed}")
    reasons: Counter[str] = Counter()
    raised: list[str] = []
    actions, slowest = 0, 0.0
    for _ in range(count):
        frame = rng.choice(FRAMES)
        text = reply(name, frame, rng)
        try:
            took, found = _timed(GRAMMARS[name], text, frame)
            if took > LIMIT_MS:  # a pause of the collector or of the machine does not come back
                took = min(took, *(_timed(GRAMMARS[name], text, frame)[0] for _ in range(3)))
        except Exception:
            raised.append(f"{text[:200]!r}: {traceback.format_exc(limit=-2)}")
            continue
        slowest = max(slowest, took)
        if isinstance(found, ParseError):
            reasons[reason_class(found.reason)] += 1
        else:
            actions += 1
    return {
        "grammar": name,
        "strings": count,
        "actions": actions,
        "errors": dict(reasons.most_common()),
        "exceptions": raised[:10],
        "slowest_ms": round(slowest, 2),
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m agentkv.grammars.fuzz", description="Random and mutated replies against the action grammars."
    )
    p.add_argument("--count", type=count, default=200_000, help="replies per grammar (200,000)")
    p.add_argument("--grammar", choices=["all", *GRAMMARS], default="all", help="one of them (all)")
    p.add_argument("--seed", type=seed, default=0, help="of the random numbers (0)")
    p.add_argument("--json", type=results_file("agentkv.grammars.fuzz"), help="write the counts here too")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 1 if a grammar raised or was too slow, else as `textkv.command.run` says."""
    return run("agentkv.grammars.fuzz", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> int:
    """One line of JSON per grammar; 1 if one raised or was too slow."""
    failed, rows, meta = False, [], run_meta("agentkv.grammars.fuzz", argv, args.seed)
    for name in GRAMMARS if args.grammar == "all" else [args.grammar]:
        report = fuzz(name, args.count, args.seed)
        failed |= bool(report["exceptions"]) or report["slowest_ms"] > LIMIT_MS
        print(json.dumps(report), flush=True)
        counts = {"reasons": len(report["errors"]), "refused": sum(report["errors"].values())}
        counts |= {"exceptions": len(report["exceptions"])}
        rows.append({key: report[key] for key in ("grammar", "strings", "actions", "slowest_ms")} | counts)
        write_rows(args.json, meta, rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
