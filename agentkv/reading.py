"""Recorded runs, read back: without a model, and without trust.

A run folder may come from anywhere, from another version, or from a disk that was full. So a name stays inside its
episode's folder, a picture is a PNG that decodes, a number is a number. What is wrong with an episode costs that
episode, in one line that says where, and never the run; `--resume` plays it again.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from agentkv.trace import DONE, RUN, STEPS, action_from_dict, episode_folder
from textkv.records import checked, listed, parse, read

NUMBER = (int, float)
# What every version wrote; what came later may be missing.
ABOUT = {"model": str, "budget": str, "methods": list, "tasks": list, "seeds": list}
ABOUT_LATER = {
    "history": int, "max_steps": (int, type(None)), "max_new_tokens": int, "device": str, "device_scale": NUMBER,
    "url": str, "goal": str, "allow": list, "expect": str, "agent": (str, type(None)), "dialogs": str, "files": str,
    "cache": str, "notes": list, "meta": dict,
}  # fmt: skip
EPISODE = {"method": str, "budget": (str, int, float), "task": str, "seed": int, "goal": str, "success": bool}
EPISODE |= {"reward": NUMBER, "stop": str, "steps": int}
STEP = {"step": int, "screenshot": str, "text": str, "action": (dict, type(None)), "reward": NUMBER, "frames": list}
STEP_LATER = dict.fromkeys(("parse_error", "error", "left_out", "reason", "url"), str)
STEP_LATER |= dict.fromkeys(("blocked", "dialogs", "files", "told", "viewport"), list) | {"success": bool}
STEP_LATER |= dict.fromkeys(
    ("prefill_tokens", "decode_tokens", "tokens_seen", "tokens_stored", "kv_bytes", "kv_bytes_peak", "kv_bytes_full",
     "seconds_prefill", "seconds_decode", "seconds_browser"), NUMBER,
)  # fmt: skip
FRAME = {"step": int, "grid": list, "kept": list}
MAX_PIXELS = 100_000_000  # of a screenshot: 4 times 4K in both directions


@dataclass(frozen=True)
class Recorded:
    """A run: what run.json holds, the finished episodes in the order of its methods, tasks and seeds, and a line for
    each that is damaged and therefore left out.
    """

    about: dict[str, Any]
    episodes: list[dict[str, Any]]
    damaged: list[str]


def read_run(run: Path) -> Recorded:
    """What is in a run folder. Raises ValueError when that is no run."""
    about, episodes, damaged = read_about(run), [], []
    for method in about["methods"]:
        for task in about["tasks"]:
            for seed in about["seeds"]:
                try:
                    episode = read_episode(inside(run, episode_folder(run, method, task, seed)))
                    episodes += [] if episode is None else [_of(episode, method, task, seed)]
                except (ValueError, OSError) as error:
                    damaged.append(str(error))
    return Recorded(about, episodes, damaged)


def _of(episode: dict[str, Any], *place: str | int) -> dict[str, Any]:
    """The episode, which must say of itself what its folder says."""
    said = tuple(episode[name] for name in ("method", "task", "seed"))
    if said != place:
        raise ValueError(f"{episode['folder'] / DONE} is of {said}, not of {place}; the episode is damaged")
    return episode


def read_about(run: Path) -> dict[str, Any]:
    """What run.json holds; lists that an earlier version did not write are empty.

    Raises:
        ValueError: there is none, it is damaged, or it names what no run can have.
    """
    path = run / RUN
    if not path.is_file():
        raise ValueError(f"{run} holds no {RUN}: it is not the --out folder of a run")
    value = read(path)
    try:
        about = {"notes": [], "meta": {}, "allow": []} | checked(value, ABOUT, ABOUT_LATER)
        for name in ("methods", "tasks", "notes", "allow"):
            listed(about[name], str, name)
        for seed in listed(about["seeds"], int, "seeds"):
            if seed < 0:
                raise ValueError(f"seed {seed} is below 0")
        for name in (*about["methods"], *about["tasks"]):
            if name in ("", ".", "..") or "\0" in name:
                raise ValueError(f"{name!r} is no name of a method or task")
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or of another version: {error}; choose another --out") from None
    return about


def inside(run: Path, folder: Path) -> Path:
    """`folder`. Raises ValueError if links lead it out of the run."""
    if not folder.resolve().is_relative_to(run.resolve()):
        raise ValueError(f"{folder} leads out of the run; a run holds no links")
    return folder


def read_episode(folder: Path) -> dict[str, Any] | None:
    """What episode.json holds, with "steps" (a list of dicts) and "folder"; None when it is not finished.

    Raises:
        ValueError: it is finished and damaged: a line, a picture, or one of its files.
    """
    if not (folder / DONE).exists():
        return None
    try:
        episode = checked(read(_plain(folder / DONE)), EPISODE, {"crashes": int})
    except (ValueError, OSError) as error:
        raise ValueError(f"{_once(folder / DONE, error)}; the episode is damaged") from None
    steps = read_steps(folder)
    if len(steps) != episode["steps"]:
        raise ValueError(f"{folder / STEPS} has {len(steps)} of {episode['steps']} steps; the episode is damaged")
    for step in steps:
        read_picture(folder, step["screenshot"])
    return {"crashes": 0, **episode, "steps": steps, "folder": folder}


def is_whole(folder: Path) -> bool:
    """Whether the episode is finished and not damaged."""
    try:
        return read_episode(folder) is not None
    except ValueError:
        return False


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """The steps recorded so far. Raises ValueError that names file and line of a damaged one."""
    path, steps = folder / STEPS, []
    try:
        lines = _plain(path).read_bytes().split(b"\n")
    except (ValueError, OSError) as error:
        raise ValueError(f"{_once(path, error)}; the episode is damaged") from None
    for number, line in enumerate(lines if lines[-1] else lines[:-1], 1):
        try:
            steps.append(_step(parse(line), len(steps)))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}; the episode is damaged") from None
    return steps


def _step(value: Any, index: int) -> dict[str, Any]:
    step = checked(value, STEP, STEP_LATER)
    if step["step"] != index:
        raise ValueError(f"it is step {step['step']} where {index} belongs")
    if step["action"] is not None:
        action_from_dict(step["action"])
    for name, kind in (("blocked", dict), ("dialogs", str), ("files", dict), ("told", str)):
        listed(step.get(name, []), kind, name)
    listed(step.get("viewport", []), int, "viewport")
    for frame in step["frames"]:
        _check_frame(frame, index)
    return step


def _check_frame(value: Any, index: int) -> None:
    frame = checked(value, FRAME, {"span": list})
    sides, kept = listed(frame["grid"], int, "grid"), listed(frame["kept"], int, "kept")
    if len(sides) != 2 or min(sides) < 1 or sides[0] * sides[1] != len(kept):
        raise ValueError(f"grid {sides} and {len(kept)} shares do not fit")
    if min(kept) < 0 or max(kept) > 100:
        raise ValueError("kept has a share outside 0 to 100")
    if not 0 <= frame["step"] <= index:
        raise ValueError(f"a frame of step {frame['step']} is not of the past")


def read_picture(folder: Path, name: str) -> bytes:
    """The PNG of that name in an episode's folder, looked through but not decoded.

    Raises:
        ValueError: not a plain name, a link, no file, or not a whole PNG.
    """
    path = folder / name
    try:
        # Both kinds of slash on every machine: a trace made on one is read on another.
        if Path(name).name != name or "\\" in name or "\0" in name:
            raise ValueError("a picture is named without folders")
        data = _plain(path).read_bytes()
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels are no screenshot")
            picture.verify()
    except OSError as error:
        told = error.strerror or "it is no PNG"
        raise ValueError(f"{path}: {told}; the episode is damaged") from None
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{folder / DONE}: picture {name!r}: {error}; the episode is damaged") from None
    return data


def open_picture(data: bytes) -> Image.Image:
    """The picture in `read_picture`'s bytes, RGB. Raises ValueError when its pixels do not decode."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"it does not decode ({error})") from None


def _plain(path: Path) -> Path:
    """The path. Raises ValueError for a link: what it leads to is not of the run."""
    if path.is_symlink():
        raise ValueError(f"{path}: it is a link")
    return path


def _once(path: Path, error: Exception) -> str:
    """The error, with the file once."""
    said = error.strerror if isinstance(error, OSError) else str(error)
    return said if said.startswith(str(path)) else f"{path}: {said}"
