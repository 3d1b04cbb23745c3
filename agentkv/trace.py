"""What happened, on disk: one folder per episode, written as it happens (`agentkv.reading` reads it back).

    RUN/run.json                                     the settings, once
    RUN/episodes/<method>/<task>/<seed>/steps.jsonl  one line per step, flushed and synced as it goes
                                       /000.png ...  the screenshot that each step saw
                                       /downloads/   files that the page gave, if any
                                       /episode.json written last and atomically: its presence means "finished"

A killed run leaves complete lines up to its last step; the unfinished episode is played again on resume.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import numpy as np
from PIL import Image

from agentkv.agent import EpisodeResult, Step
from agentkv.envs import actions
from agentkv.grammars import ParseError
from textkv.disk import NoSpace, disk_errors, write_whole
from textkv.records import build, checked, listed

ACTIONS = {cls.__name__: cls for cls in get_args(actions.Action)}
STEPS, DONE, RUN, DOWNLOADS = "steps.jsonl", "episode.json", "run.json", "downloads"
RESUME = "--resume goes on"  # what helps after a disk was full


def need_space(folder: Path, need: int) -> None:
    """Raise NoSpace when the disk of `folder` (which may not exist yet) has fewer than `need` bytes free."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < need:
        raise NoSpace(
            f"{folder}: {free / 1e6:.0f} MB free, about {need / 1e6:.0f} MB needed for the traces; "
            "free some space or choose another --out"
        )


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that `path` holds either all of it or what it held before."""
    write_whole(path, json.dumps(value, indent=1).encode(), RESUME)


def episode_folder(run: Path, method: str, task: str, seed: int) -> Path:
    """Where that episode is kept; names with slashes and the like are percent-encoded."""
    return run / "episodes" / quote(method, safe="+()=,") / quote(task, safe="") / str(seed)


def action_to_dict(action: actions.Action | ParseError) -> dict[str, Any] | None:
    """The action as JSON, None for an answer that could not be read."""
    if isinstance(action, actions.Several):
        return {"type": "Several", "actions": [action_to_dict(part) for part in action.actions]}
    return None if isinstance(action, ParseError) else {"type": type(action).__name__, **asdict(action)}


def action_from_dict(value: Any) -> actions.Action:
    """Back from JSON. Raises ValueError for what is no action, or has a field that its type has not."""
    if checked(value, {"type": str})["type"] not in ACTIONS:
        raise ValueError(f"action type {value['type']!r} is none of {', '.join(ACTIONS)}")
    fields = {name: field for name, field in value.items() if name != "type"}
    if value["type"] != "Several":
        return build(ACTIONS[value["type"]], fields)
    made = tuple(map(action_from_dict, listed(checked(fields, {"actions": list})["actions"], dict, "actions")))
    if len(fields) > 1 or any(isinstance(part, actions.Several) for part in made):
        raise ValueError("Several has actions alone, and they do not nest")
    return actions.Several(made)


def step_to_dict(step: Step) -> dict[str, Any]:
    """One line of steps.jsonl. `kept`: per frame, percent of layers x heads per visual token, row by row."""
    d = step.decision
    action = action_to_dict(d.action)
    return {
        "step": step.index,
        "screenshot": f"{step.index:03d}.png",
        "text": d.text,
        "action": action,
        "parse_error": step.error if action is None else "",
        "error": step.error,
        "left_out": d.left_out,
        "reward": step.reward,
        "success": step.success,
        "reason": step.reason,
        "url": step.url,
        "blocked": list(step.blocked),
        "dialogs": list(step.dialogs),
        "files": list(step.files),
        "told": list(step.told),
        "viewport": list(step.viewport),
        "prefill_tokens": d.prompt_tokens - d.reused_tokens,
        "decode_tokens": d.decode_tokens,
        "tokens_seen": d.prompt_tokens,
        "tokens_stored": round(d.tokens_stored, 2),
        "kv_bytes": d.kv_bytes,
        "kv_bytes_peak": d.kv_bytes_peak,
        "kv_bytes_full": d.kv_bytes_full,
        "seconds_prefill": round(d.seconds_prefill, 6),
        "seconds_decode": round(d.seconds_decode, 6),
        "seconds_browser": round(step.seconds_browser, 6),
        "frames": [
            {
                "step": number,
                "span": list(span),
                "grid": list(frame.share.shape),
                "kept": np.rint(frame.share * 100).astype(int).ravel().tolist(),
            }
            for number, span, frame in zip(step.frame_steps, d.spans, d.frames, strict=True)
        ],
    }


class EpisodeTrace:
    """Writes one episode; what an earlier, unfinished try left in the folder is removed first."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self.about, self.steps = folder, about, 0
        with disk_errors(folder, RESUME):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            # Nothing is held back: what a full disk did not take must not be tried again when the file is closed.
            self.file = (folder / STEPS).open("ab", buffering=0)

    def step(self, step: Step) -> None:
        """Keep the screenshot, then the line: a line never names a picture that is not there."""
        line, png = step_to_dict(step), io.BytesIO()
        Image.fromarray(step.screenshot).save(png, "PNG", optimize=True)
        with disk_errors(self.folder, RESUME):
            (self.folder / line["screenshot"]).write_bytes(png.getvalue())
            rest = json.dumps(line).encode() + b"\n"
            while rest:  # the system may take a part
                rest = rest[self.file.write(rest) :]
            os.fsync(self.file.fileno())
        self.steps += 1

    def finish(self, result: EpisodeResult, crashes: int) -> None:
        """Mark the episode as finished."""
        write_json(self.folder / DONE, {**self.about, **asdict(result), "crashes": crashes})

    def close(self) -> None:
        """Close the file; what was recorded stays."""
        self.file.close()
