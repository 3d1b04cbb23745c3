"""A Gymnasium environment over one web task: a screenshot and a goal out, a typed action in, done with real events.

Reward: the raw reward of the task, given once, on the step that ends the episode. Every `reset` loads the page
afresh in a new isolated context, so nothing survives an episode. A wrong action (outside the screen, no such key)
does nothing and says so in `info["error"]`. `BrowserCrashed` passes through `step`; the next `reset` starts a new
browser.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from playwright.sync_api import Page

from .act import check, perform
from .actions import Action, CallUser, Finished, ending
from .browser import Browser
from .patience import GivenUp
from .spaces import ActionSpace, GoalSpace
from .tab import BrowserCrashed, Manners, PageNotLoaded, Tab
from .task import Task, Verdict

SEED_LIMIT = 2**31


class WebEnv(gym.Env[dict[str, Any], Action]):
    """`task` on `browser` (None = its own, launched at the first reset and closed with the environment).

    - device_scale: device pixels per CSS pixel; the screenshot is uint8 [height * scale, width * scale, 3], actions
      stay in CSS pixels
    - load_timeout: seconds for the page to load
    - step_timeout: seconds after which a page that hangs is killed with its browser
    - reuse_tab: each reset loads the page anew in the same tab; quicker, but what the page stored stays
    - manners: who answers dialogs, where uploads come from and downloads go; may be replaced between two episodes
    - info: `raw_reward`, `success` (raw reward == 1), `error`, `reason`, `url`, `seed`, `steps`; of this step alone:
      `blocked` (list of dicts kind/url/reason), `dialogs` (texts), `files` (list of dicts kind/path/bytes) and `told`,
      sentences on all of it for whoever acts next
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(
        self,
        task: Task,
        browser: Browser | None = None,
        device_scale: float = 1.0,
        max_steps: int | None = None,
        load_timeout: float = 30.0,
        step_timeout: float = 30.0,
        reuse_tab: bool = False,
        manners: Manners | None = None,
    ) -> None:
        width, height = task.viewport
        size = (round(height * device_scale), round(width * device_scale))
        if device_scale <= 0 or abs(size[0] - height * device_scale) + abs(size[1] - width * device_scale) > 1e-6:
            raise ValueError(
                f"device_scale={device_scale} makes broken pixels of {width} x {height}; use 1, 1.5, 2 or 4"
            )
        self.task = task
        self.browser = browser or Browser(machine_fonts=task.machine_fonts)
        self.device_scale = device_scale
        self.max_steps = task.max_steps if max_steps is None else max_steps
        self.load_timeout = load_timeout
        self.step_timeout = step_timeout
        self.reuse_tab = reuse_tab
        self.manners = manners or Manners()
        self.render_mode = "rgb_array"
        self.observation_space = spaces.Dict(
            {"screenshot": spaces.Box(0, 255, shape=(*size, 3), dtype=np.uint8), "goal": GoalSpace()}
        )
        self.action_space = ActionSpace(task.viewport)
        self.tab: Tab | None = None
        self.goal = ""
        self.over = True
        self._owns_browser = browser is None
        self._seed = 0
        self._steps = 0
        self._last: np.ndarray | None = None

    @property
    def page(self) -> Page:
        """Playwright's page of the running episode."""
        return self._open_tab().page

    def _open_tab(self) -> Tab:
        if self.tab is None:
            raise RuntimeError("there is no episode yet; call reset() first")
        return self.tab

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Load the page afresh and make it the episode of `seed` (None = the next of this environment's own stream)."""
        super().reset(seed=seed)
        self._seed = int(self.np_random.integers(SEED_LIMIT)) if seed is None else seed
        self._steps = 0
        self.over = True
        self.tab = self._fresh_tab()
        with self.browser.deadline(self.load_timeout + self.step_timeout):
            observation = self._begin(self.tab)
        self.over = False
        return observation, self._info(Verdict(False), "")

    def _begin(self, tab: Tab) -> dict[str, Any]:
        tab.goto(self.task.url, self.load_timeout)
        try:
            self.task.setup(tab, self._seed)
            tab.settle()
            self.goal = self.task.goal(tab)
        except GivenUp as why:
            raise PageNotLoaded(f"{self.task.url} cannot be shown: {why}") from why
        return self._observe()

    def _fresh_tab(self) -> Tab:
        with suppress(BrowserCrashed), self.browser.deadline(self.step_timeout):
            if self.reuse_tab and self.tab is not None and self.tab.renew():
                return self.tab
        self._close_tab()
        if not self.browser.alive:
            self.browser.relaunch()
        return self.browser.open(self.task.allow, self.task.viewport, self.device_scale, self.manners)

    def step(self, action: Action) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Execute one action. Raises RuntimeError before `reset` and after the end, `BrowserCrashed` for a dead
        page.
        """
        tab = self._open_tab()
        if self.over:
            raise RuntimeError("the episode is over; call reset() first")
        self._steps += 1
        with self.browser.deadline(self.step_timeout), tab.guard():
            size = self.task.viewport
            error = check(action, size) or tab.act(action, lambda page, part: perform(page, part, size))
            tab.settle()
            verdict = self._judge(tab, None if error else ending(action))
            observation = self._observe()
        terminated = verdict.done
        truncated = not terminated and self._steps >= self.max_steps
        self.over = terminated or truncated
        reward = verdict.raw_reward if terminated else 0.0
        return observation, reward, terminated, truncated, self._info(verdict, error)

    def _judge(self, tab: Tab, end: Finished | CallUser | None) -> Verdict:
        answer = end.answer if isinstance(end, Finished) else None
        try:
            verdict = self.task.verdict(tab, answer)
        except GivenUp as unknown:
            verdict = Verdict(False, reason=str(unknown))
        if verdict.done:
            return verdict
        if isinstance(end, Finished):
            return Verdict(True, verdict.raw_reward, verdict.reason or "the agent finished before the task was done")
        if isinstance(end, CallUser):
            return Verdict(True, 0.0, "the agent called the user")
        return verdict

    def _observe(self) -> dict[str, Any]:
        self._last = self._open_tab().screenshot()
        return {"screenshot": self._last, "goal": self.goal}

    def _info(self, verdict: Verdict, error: str) -> dict[str, Any]:
        tab = self._open_tab()
        blocked, dialogs, transfers, told = tab.record.take()
        return {
            "raw_reward": float(verdict.raw_reward),
            "success": verdict.done and verdict.raw_reward == 1,
            "error": error,
            "reason": verdict.reason,
            "url": tab.page.url,
            "seed": self._seed,
            "steps": self._steps,
            "blocked": [vars(entry) for entry in blocked],
            "dialogs": dialogs,
            "files": [vars(entry) for entry in transfers],
            "told": told,
        }

    def render(self) -> np.ndarray | None:
        """The last screenshot, None before the first reset."""
        return self._last

    def _close_tab(self) -> None:
        if self.tab is not None:
            with suppress(BrowserCrashed), self.browser.deadline(self.step_timeout):
                self.tab.close()
            self.tab = None
        self.over = True

    def close(self) -> None:
        """Close the page, and the browser if it is this environment's own."""
        self._close_tab()
        if self._owns_browser:
            self.browser.close()
