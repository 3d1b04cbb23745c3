"""What happened, on disk: one folder per episode, written as it happens, read back without a model.

    RUN/run.json                                     the settings, once
    RUN/episodes/<method>/<task>/<seed>/steps.jsonl  one line per step, flushed and synced as it goes
                                       /000.png ...  the screenshot that each step saw
                                       /downloads/   files that the page gave, if any
                                       /episode.json written last and atomically: its presence means "finished"

A killed run leaves complete lines up to its last step; the unfinished episode is played again on resume.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import numpy as np
from PIL import Image

from agentkv.agent import EpisodeResult, Step
from agentkv.envs import actions
from agentkv.grammars import ParseError

ACTIONS = {cls.__name__: cls for cls in get_args(actions.Action)}
STEPS, DONE, RUN, DOWNLOADS = "steps.jsonl", "episode.json", "run.json", "downloads"


class NoSpace(OSError):
    """The disk is full, or too full to begin; the message names the folder."""


def need_space(folder: Path, need: int) -> None:
    """Raise NoSpace when the disk of `folder` (which may not exist yet) has fewer than `need` bytes free."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < need:
        raise NoSpace(
            f"{folder}: {free / 1e6:.0f} MB free, about {need / 1e6:.0f} MB needed for the traces; "
            "free some space or choose another --out"
        )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn "no space left" while writing below `folder` into NoSpace."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NoSpace(f"{folder}: the disk is full; free some space and go on with --resume") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that `path` holds either all of it or what it held before."""
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with part.open("w") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)


def episode_folder(run: Path, method: str, task: str, seed: int) -> Path:
    """Where that episode is kept; names with slashes and the like are percent-encoded."""
    return run / "episodes" / quote(method, safe="+()=,") / quote(task, safe="") / str(seed)


def action_to_dict(action: actions.Action | ParseError) -> dict[str, Any] | None:
    """The action as JSON, None for an answer that could not be read."""
    if isinstance(action, actions.Several):
        return {"type": "Several", "actions": [action_to_dict(part) for part in action.actions]}
    return None if isinstance(action, ParseError) else {"type": type(action).__name__, **asdict(action)}


def action_from_dict(value: dict[str, Any]) -> actions.Action:
    """Back from JSON. Raises ValueError for a type that no action has."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k != "type"}
    if value.get("type") not in ACTIONS:
        raise ValueError(f"action type {value.get('type')!r} is none of {', '.join(ACTIONS)}")
    if value["type"] == "Several":
        return actions.Several(tuple(action_from_dict(part) for part in value["actions"]))
    return ACTIONS[value["type"]](**fields)


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
        with disk_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self.file = (folder / STEPS).open("a")

    def step(self, step: Step) -> None:
        """Keep the screenshot, then the line: a line never names a picture that is not there."""
        line = step_to_dict(step)
        with disk_errors(self.folder):
            Image.fromarray(step.screenshot).save(self.folder / line["screenshot"], optimize=True)
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        self.steps += 1

    def finish(self, result: EpisodeResult, crashes: int) -> None:
        """Mark the episode as finished."""
        write_json(self.folder / DONE, {**self.about, **asdict(result), "crashes": crashes})

    def close(self) -> None:
        """Close the file; what was recorded stays."""
        self.file.close()


def read_episode(folder: Path) -> dict[str, Any] | None:
    """What episode.json holds with "steps" (a list of dicts) and "folder"; None when it is not finished.

    Raises ValueError naming the file when a line is not JSON: such a trace was changed by hand or the disk lost it.
    """
    if not (folder / DONE).exists():
        return None
    episode = json.loads((folder / DONE).read_text())
    return {**episode, "steps": read_steps(folder), "folder": folder}


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """The steps recorded so far."""
    path = folder / STEPS
    steps = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            steps.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON; the trace is damaged, play this episode again") from error
    return steps


def read_run(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what run.json holds, the finished episodes in the order of methods, tasks, seeds of the run).

    Raises ValueError when `run` holds no run.
    """
    if not (run / RUN).exists():
        raise ValueError(f"{run} holds no {RUN}: it is not the --out folder of a run")
    about = json.loads((run / RUN).read_text())
    folders = (episode_folder(run, m, t, s) for m in about["methods"] for t in about["tasks"] for s in about["seeds"])
    return about, [e for e in map(read_episode, folders) if e is not None]
