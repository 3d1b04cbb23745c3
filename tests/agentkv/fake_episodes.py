"""Episodes without browser or trained model: a fake page, made-up decisions, a run folder of them, a tiny adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agentkv.agent import Decision, FrameKept, Limits, run_episode
from agentkv.envs.actions import Action, Click
from agentkv.grammars import ParseError
from agentkv.grammars.base import Reading
from agentkv.play import Plan, open_folder
from agentkv.stats import UNITS
from agentkv.trace import EpisodeTrace, episode_folder

META = {
    "command": "python -m agentkv.run",
    "commit": None,
    "versions": {},
    "hardware": "a test",
    "seed": 0,
    "units": UNITS,
}


@dataclass
class FakeEnv:
    """A page that is solved by the click after `needed` others; `frozen` keeps its screenshot the same."""

    needed: int = 2
    frozen: bool = False
    error: str = ""
    max_steps: int = 20
    goal: str = "click it"
    task: Any = field(default_factory=lambda: SimpleNamespace(viewport=(30, 40)))

    def _observe(self) -> dict[str, Any]:
        shade = 0 if self.frozen else self.acted
        return {"screenshot": np.full((40, 30, 3), shade, np.uint8), "goal": self.goal}

    def reset(self, *, seed: int) -> tuple[dict, dict]:
        self.seed, self.acted = seed, 0
        return self._observe(), {}

    def step(self, action: Action) -> tuple[dict, float, bool, bool, dict]:
        self.acted += 1
        done = self.acted > self.needed
        info = {
            "raw_reward": float(done),
            "success": done,
            "error": self.error,
            "reason": "",
            "url": "file:///a",
            "blocked": [],
            "dialogs": [],
            "files": [],
            "told": [],
        }
        return self._observe(), float(done), done, self.acted >= self.max_steps, info


class FakePolicy:
    """Plays `actions` (an endless click where they end) as a model would; remembers the prompts that it was given."""

    def __init__(
        self, actions: Iterable[Action | ParseError] = (), share: float = 1.0, text: str = "Action: click"
    ) -> None:
        self.given, self.share, self.text = list(actions), share, text
        self.prompts: list[tuple[str, list]] = []

    def start(self, env: Any) -> None:
        self.actions = iter(self.given)

    def decide(self, goal: str, history: Any, screenshot: Any, viewport: tuple[int, int]) -> Decision:
        self.prompts.append((goal, list(history)))
        action = next(self.actions, Click(10.0, 20.5))
        shown = sum(image is not None for image, _ in history) + 1
        rng = np.random.default_rng(len(self.prompts))
        kept = tuple(FrameKept((rng.random((3, 4)) < self.share).astype(float)) for _ in range(shown))
        full = 1000 * shown
        return Decision(
            text=self.text,
            action=action,
            prompt_tokens=20 + 12 * shown,
            decode_tokens=5,
            seconds_prefill=0.25,
            seconds_decode=0.5,
            kv_bytes=int(full * self.share),
            kv_bytes_peak=full,
            kv_bytes_full=full,
            tokens_stored=(20 + 12 * shown) * self.share,
            spans=tuple((10 + 12 * k, 22 + 12 * k) for k in range(shown)),
            frames=kept,
        )


def fake_run(
    out: Path, policies: dict[str, FakePolicy], tasks: tuple[str, ...] = ("click-tab",), seeds: int = 2, **env: Any
) -> Path:
    """A finished run in `out`: every policy plays every task and seed on a FakeEnv."""
    plan = Plan("mini", tuple(policies), "0.4", tasks, tuple(range(1_000_000, 1_000_000 + seeds)))
    open_folder(out, plan, False, META, [])
    for seed, task, method in plan.episodes():
        about = {"method": method, "budget": 0.4, "task": task, "seed": seed}
        trace = EpisodeTrace(episode_folder(out, method, task, seed), about)
        trace.finish(run_episode(FakeEnv(**env), policies[method], seed, Limits(), 5, trace.step), 0)
        trace.close()
    return out


@dataclass
class TinyAdapter:
    """A text model dressed as a vision model: 12 of its prompt's 40 tokens play the screenshot; it always clicks."""

    model: LlamaForCausalLM
    history_frames: int = 5
    answer_tokens: int = 64
    cache: str = "fresh"

    def __post_init__(self) -> None:
        self.tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(map(str, ids)))
        self.processor = SimpleNamespace(size={"longest_edge": 1})

    def prompt(self, goal: str, history: Any, screenshot: Any, css_size: tuple[int, int]) -> SimpleNamespace:
        ids = torch.arange(1, 41)[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return SimpleNamespace(
            pictures=(), inputs=inputs, spans=[(5, 17)], frames=[SimpleNamespace(grid=(3, 4))], grids=[(3, 4)]
        )

    def words_of(self, answer: list[int]) -> str:
        return " ".join(map(str, answer))

    def read(self, text: str, frame: Any) -> Reading | ParseError:
        return Reading((Click(1.0, 2.0),))


def tiny_adapter() -> TinyAdapter:
    """The adapter with random weights, the same ones every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return TinyAdapter(LlamaForCausalLM(config).eval())
