"""What a model family must offer to be an agent: a prompt from screenshots and words, and the way back from words to
actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentkv.envs.actions import Action
from agentkv.grammars import Frame, ParseError
from agentkv.spans import Span

__all__ = ["AgentText", "Frame", "Grammar", "History", "ModelAdapter", "ParseError", "Prompt"]

# past steps, oldest first: the screenshot (None = too old to be shown) and what was answered to it
History = Sequence[tuple[Image.Image | None, str]]


@dataclass(frozen=True)
class AgentText:
    """The fixed words of a prompt. `prompt` holds `{goal}`; both may hold `{width}` and `{height}`, the current
    screenshot's size in the numbers in which the model names points. `history_frames` counts screenshots, the current
    one included.
    """

    system: str
    prompt: str
    history_frames: int = 5

    def __post_init__(self) -> None:
        if "{goal}" not in self.prompt:
            raise ValueError("the prompt of agent.json has no {goal}; put it where the task's words belong")
        if self.history_frames < 1:
            raise ValueError(f"history_frames={self.history_frames} shows nothing; use at least 1")


@dataclass(frozen=True)
class Prompt:
    """One prompt: `inputs` for `model(**inputs)` (input_ids [1, S], attention_mask, mm_token_type_ids, pixel_values,
    image_grid_thw); `spans` [start, end) of its screenshots, oldest first, the current one last; their `frames`."""

    inputs: dict[str, torch.Tensor]
    spans: list[Span]
    frames: list[Frame]


class Grammar(Protocol):
    """A module of `agentkv.grammars`."""

    def parse(self, text: str, frame: Frame) -> Action | ParseError:
        """The action that a reply says, its points in the frame's own screen; or what is wrong with the reply."""

    def render(self, action: Action, frame: Frame) -> str:
        """The reply that says this action; raises ValueError if the grammar has no words for it."""


class ModelAdapter(Protocol):
    """One model with its tokenizer and image processor; `history_frames` = screenshots per prompt that it was
    trained for.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processor: Any
    history_frames: int

    def prompt(
        self, goal: str, history: History, screenshot: Image.Image, css_size: tuple[int, int] | None = None
    ) -> Prompt:
        """The prompt for one decision. css_size: (width, height) of the viewport, if the screenshots have more
        pixels than that.
        """
        ...

    def parse(self, text: str, frame: Frame) -> Action | ParseError:
        """The first action that `text` states, in CSS pixels, or why there is none; never raises."""
        ...

    def render(self, action: Action, frame: Frame) -> str:
        """`action` in the model's words."""
        ...
