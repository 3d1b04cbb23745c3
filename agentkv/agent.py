"""The loop of a GUI agent: observe, prompt, decide with a compressed cache, parse, act.

`Agent` is the model's side: one decision = one fresh prompt (task, text history, last screenshots), one prefill that
the method compresses, one greedy decode (GUI-KV, arXiv 2510.00536, works the same way: no cache outlives a step).
`run_episode` is the loop; it takes any policy, so that it runs with a scripted one where there is no model. It writes
nothing: what happened is handed to `on_step` as it happens (`agentkv.trace` keeps it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

import textkv
from agentkv.answering import Answered, Asked, answer
from agentkv.envs.actions import Action, Finished, Several, ending
from agentkv.grammars import Frame, ParseError
from agentkv.models import History, ModelAdapter
from agentkv.models.base import ADDRESS
from textkv import Budget
from textkv.cache import Trajectory


@dataclass(frozen=True)
class FrameKept:
    """What is left of one screenshot in the cache: `share` [rows, cols] of layers x stored heads per visual token."""

    share: np.ndarray


@dataclass(frozen=True)
class Decision:
    """One answer of a policy. Bytes and tokens are of the cache; a policy without a model leaves them at 0.

    `kv_bytes`, `kv_bytes_full`, `tokens_stored` (mean per head) are taken right after the prompt was compressed;
    `kv_bytes_peak` is the most held at any moment. `frames` are the prompt's screenshots, oldest first, `spans` their
    half-open [start, end) of prompt positions. Seconds are wall clock. `left_out`: what of the answer is not in
    `action`, and why. `frame` is the current screenshot as the model saw it. `reused_tokens` of the prompt were in the
    cache already.
    """

    text: str
    action: Action | ParseError
    left_out: str = ""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    decode_tokens: int = 0
    seconds_prefill: float = 0.0
    seconds_decode: float = 0.0
    kv_bytes: int = 0
    kv_bytes_peak: int = 0
    kv_bytes_full: int = 0
    tokens_stored: float = 0.0
    spans: tuple[tuple[int, int], ...] = ()
    frames: tuple[FrameKept, ...] = ()
    frame: Frame | None = None


class Policy(Protocol):
    """Whatever can play: the model (`Agent`), a script (`ScriptPolicy`)."""

    def start(self, env: Any) -> None:
        """A new episode begins on `env`, which was just reset."""

    def decide(self, goal: str, history: History, screenshot: Image.Image, viewport: tuple[int, int]) -> Decision:
        """The next action for what is on the screen now; `viewport` is (width, height) in CSS pixels."""


class Agent:
    """A model behind its adapter, deciding with the cache that `method` and `budget` describe.

    `max_new_tokens` limits one answer; None = as long as the family's answers are. The model is switched to textkv's
    attention once, here. `ask`: who answers in place of the adapter's model. Raises ValueError for an unknown method or
    a bad budget.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        method: str,
        budget: Budget | float | str,
        max_new_tokens: int | None = None,
        ask: Callable[[Asked], Answered] | None = None,
    ) -> None:
        max_new_tokens = adapter.answer_tokens if max_new_tokens is None else max_new_tokens
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for an answer; use 64")
        self.adapter, self.method = adapter, method
        self.budget = budget if isinstance(budget, Budget) else Budget.parse(str(budget))
        self.max_new_tokens = max_new_tokens
        if ask is None:
            textkv.use(adapter.model)
        self._ask = ask or partial(answer, adapter.model)
        self._learned: Trajectory | None = None

    def start(self, env: Any) -> None:
        """A new episode. Every decision builds its own prompt and cache; only what a method learned from the steps goes
        on."""
        self._learned = None

    @torch.inference_mode()
    def decide(self, goal: str, history: History, screenshot: Image.Image, viewport: tuple[int, int]) -> Decision:
        """Prompt, prefill, compress, decode greedily, parse. Never raises for what the model says."""
        prompt = self.adapter.prompt(goal, history, screenshot, viewport)
        about = self.method, self.budget, self.max_new_tokens, self._learned, prompt.pictures
        found = self._ask(Asked(prompt.inputs, prompt.spans, prompt.grids, *about))
        self._learned = found.learned
        text = self.adapter.words_of(found.tokens)
        action, left_out = self._understood(text, self._cut(found.tokens), prompt.frames[-1])
        return Decision(
            text=text,
            action=action,
            left_out=left_out,
            prompt_tokens=prompt.inputs["input_ids"].shape[1],
            decode_tokens=len(found.tokens),
            seconds_prefill=found.seconds_prefill,
            seconds_decode=found.seconds_decode,
            kv_bytes=found.kv_bytes,
            kv_bytes_peak=found.kv_bytes_peak,
            kv_bytes_full=found.kv_bytes_full,
            tokens_stored=found.tokens_stored,
            spans=tuple((int(s), int(e)) for s, e in prompt.spans),
            frames=kept_frames(found.kept, prompt.spans, prompt.grids),
            frame=prompt.frames[-1],
        )

    def _cut(self, answer: Sequence[int]) -> bool:
        """Whether the length limit ended the answer, not the model."""
        ends = self.adapter.model.generation_config.eos_token_id
        return len(answer) >= self.max_new_tokens and answer[-1] not in (ends if isinstance(ends, list) else [ends])

    def _understood(self, text: str, cut: bool, frame: Frame) -> tuple[Action | ParseError, str]:
        """What the answer says as one step, and what of it is left out. Of one that was cut, actions that stand there
        whole are done.
        """
        reading = self.adapter.read(text, frame)
        told = f"the answer was cut after {self.max_new_tokens} tokens" if cut else ""
        if isinstance(reading, ParseError):
            return (ParseError(told, len(text)) if cut else reading), ""
        return reading.action, "; ".join(filter(None, (told, reading.left_out)))


def kept_frames(
    kept: Sequence[torch.Tensor], spans: Sequence[tuple[int, int]], grids: Sequence[tuple[int, ...]]
) -> tuple[FrameKept, ...]:
    """Share of layers x stored heads that still hold each visual token.

    `kept`: per layer int [1, heads, n] prompt positions, padded with -1; `spans`: [start, end) per frame; `grids`:
    (..., rows, columns) per frame, of tokens or of patches (a token merges a square of them). Raises ValueError when
    a span and its grid do not fit.
    """
    positions = torch.cat([layer.reshape(-1) for layer in kept])
    heads = sum(layer.shape[1] for layer in kept)
    frames = []
    for (start, end), (*_, rows, cols) in zip(spans, grids, strict=True):
        merge = isqrt(rows * cols // (end - start))
        if merge == 0 or (end - start) * merge * merge != rows * cols:
            raise ValueError(f"span [{start}, {end}) has {end - start} tokens, its grid {rows} x {cols} does not fit")
        inside = positions[(positions >= start) & (positions < end)] - start
        share = torch.bincount(inside, minlength=end - start).float() / heads
        frames.append(FrameKept(share.view(rows // merge, cols // merge).numpy()))
    return tuple(frames)


class ScriptPolicy:
    """Plays what `script(env)` yields, one action at a time; says Finished when the script ends.

    `envs.oracle.solve` is such a script; so is a recorded episode.
    """

    def __init__(self, script: Callable[[Any], Any]) -> None:
        self.script = script

    def start(self, env: Any) -> None:
        """Ask the script for this episode's actions."""
        self.actions = iter(self.script(env))

    def decide(self, goal: str, history: History, screenshot: Image.Image, viewport: tuple[int, int]) -> Decision:
        """The script's next action, whatever the screen shows; `Finished` when there is none left."""
        action = next(self.actions, Finished())
        return Decision(text=str(action), action=action)


@dataclass(frozen=True)
class Limits:
    """When an episode stops besides being done.

    `parse_failures`: unreadable answers in all. `repeats`: the same action on the same unchanged screenshot in a row.
    """

    max_steps: int = 20
    parse_failures: int = 3
    repeats: int = 3

    def __post_init__(self) -> None:
        for name in ("max_steps", "parse_failures", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} stops before the first step; use 1 or more")


@dataclass(frozen=True)
class Step:
    """One step as it happened: what was shown, decided, and what the page made of it."""

    index: int
    screenshot: np.ndarray  # uint8 [H, W, 3], before the action
    decision: Decision
    frame_steps: tuple[int, ...]  # which step's screenshot each of decision.frames is
    reward: float
    success: bool
    error: str  # of the page or the parser; "" when the action ran
    reason: str  # the task's own words on the reward
    url: str
    blocked: tuple[dict[str, str], ...]  # what the page tried and was refused
    dialogs: tuple[str, ...]  # alert, confirm and prompt as the page opened them
    files: tuple[dict[str, Any], ...]  # what was uploaded or downloaded: kind, path, bytes
    told: tuple[str, ...]  # what the next prompt says of this step besides the error
    viewport: tuple[int, int]  # (width, height) in CSS pixels, in which actions are given
    seconds_browser: float


@dataclass(frozen=True)
class EpisodeResult:
    """How an episode ended. `reward` is the last raw reward (-1..1), `success` means that it was 1."""

    goal: str
    success: bool
    reward: float
    stop: str  # "done", "step limit", "parse failures", "repeated action"
    steps: int
    seconds_reset: float


@dataclass
class _Watch:
    """Counts towards the limits."""

    limits: Limits
    parse_failures: int = 0
    repeats: int = 0
    last: tuple[Action | ParseError, np.ndarray] | None = None

    def stop(self, step: Step, terminated: bool, truncated: bool) -> str:
        """Why to stop after `step`; "" to go on."""
        action = step.decision.action
        same = self.last is not None and self.last[0] == action and np.array_equal(self.last[1], step.screenshot)
        self.repeats = self.repeats + 1 if same else 1
        self.last = (action, step.screenshot)
        self.parse_failures += isinstance(action, ParseError)
        if terminated or (not isinstance(action, ParseError) and ending(action) and not _stuck(step)):
            return "done"
        if self.parse_failures >= self.limits.parse_failures:
            return "parse failures"
        if self.repeats >= self.limits.repeats:
            return "repeated action"
        return "step limit" if truncated or step.index + 1 >= self.limits.max_steps else ""


def _stuck(step: Step) -> bool:
    """Whether an answer of several gestures did not come to its end."""
    return isinstance(step.decision.action, Several) and bool(step.error)


def run_episode(
    env: Any,
    policy: Policy,
    seed: int,
    limits: Limits | None = None,
    history: int = 5,
    on_step: Callable[[Step], None] | None = None,
) -> EpisodeResult:
    """Play one episode of `env` (an `envs.make` environment) from `seed`.

    `history` counts the screenshots in a prompt, the current one included (5 in the paper); older steps stay as text.
    `on_step` sees every step right after it happened. An answer that cannot be read costs a step and its error goes
    into the next prompt. What `env` raises (a dead browser) passes.
    """
    if history < 1:
        raise ValueError(f"history={history} would hide the current screenshot too; use 1 for no earlier ones")
    begin = perf_counter()
    obs, begun = env.reset(seed=seed)
    seconds_reset = perf_counter() - begin
    goal = obs["goal"]
    policy.start(env)
    watch, past, stop, step, address = _Watch(limits or Limits()), [], "", None, begun.get("url")
    while not stop:
        shown = [(image if i >= len(past) - history + 1 else None, text) for i, (image, text) in enumerate(past)]
        screenshot = Image.fromarray(obs["screenshot"])
        screenshot.info |= {ADDRESS: address} if address else {}
        decision = policy.decide(goal, shown, screenshot, env.task.viewport)
        step, obs, terminated, truncated = _act(env, obs, decision, len(past))
        step = step if past else _with(begun, step)
        stop, address = watch.stop(step, terminated, truncated), step.url or address
        notes = (f"[{note}]" for note in (step.error, *step.told, decision.left_out) if note)
        past.append((screenshot, "\n".join((decision.text, *notes))))
        if on_step is not None:
            on_step(step)
    success, reward = (step.success, step.reward) if step else (False, 0.0)
    return EpisodeResult(goal, success, reward, stop, len(past), seconds_reset)


def _with(begun: dict[str, Any], step: Step) -> Step:
    """The first step with what happened while its page was loaded."""
    names = ("blocked", "dialogs", "files", "told")
    return replace(step, **{name: (*begun.get(name, ()), *getattr(step, name)) for name in names})


def _act(env: Any, obs: dict[str, Any], decision: Decision, index: int) -> tuple[Step, dict[str, Any], bool, bool]:
    """Run the decided action: (the step, the next observation, terminated, truncated)."""
    step = Step(
        index=index,
        screenshot=obs["screenshot"],
        decision=decision,
        frame_steps=tuple(range(index + 1 - len(decision.frames), index + 1)),
        reward=0.0,
        success=False,
        error="",
        reason="",
        url="",
        blocked=(),
        dialogs=(),
        files=(),
        told=(),
        viewport=env.task.viewport,
        seconds_browser=0.0,
    )
    if isinstance(decision.action, ParseError):
        return replace(step, error=decision.action.reason), obs, False, False
    begin = perf_counter()
    obs, _, terminated, truncated, info = env.step(decision.action)
    step = replace(
        step,
        reward=float(info["raw_reward"]),
        success=bool(info["success"]),
        error=info["error"],
        reason=info["reason"],
        url=info["url"],
        blocked=tuple(info["blocked"]),
        dialogs=tuple(info["dialogs"]),
        files=tuple(info["files"]),
        told=tuple(info["told"]),
        seconds_browser=perf_counter() - begin,
    )
    return step, obs, terminated, truncated
