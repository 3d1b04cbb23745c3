"""What a model family must offer to be an agent: a prompt from screenshots and words, and the way back from words to
actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from agentkv.envs.actions import Action
from agentkv.grammars import Frame, ParseError
from agentkv.grammars.base import Grammar, Reading
from agentkv.spans import Span

__all__ = ["ADDRESS", "AgentText", "Frame", "Grammar", "History", "ModelAdapter", "ParseError", "Prompt"]

# past steps, oldest first: the screenshot (None = too old to be shown) and what was answered to it
History = Sequence[tuple[Image.Image | None, str]]
ADDRESS = "page address"  # key of a screenshot's `info`: the address of the page that it shows, where that is known


@dataclass(frozen=True)
class AgentText:
    """The fixed words of a prompt, and its lengths.

    `prompt` holds `{goal}`; it may hold `{image}`, where the screenshot of its turn stands (else in front), `{step}`,
    the number of the current step from 1, and `{steps}`, the earlier steps whose screenshot is no longer shown, as
    lines. `later` stands beside every other screenshot; a line of it with `{url}`, the address of the page that the
    screenshot shows, is left out where nobody knows the address (`ADDRESS`). All may hold `{width}` and `{height}`, the
    current screenshot's size in the numbers in which the model names points. `history_frames` counts screenshots, the
    current one included; `answer_tokens` is the length limit of one answer. `cache`: "fresh" for a model that was
    trained on prompts in the layout of its authors, "persistent" for one that also knows the chat that only grows
    (`agentkv.persistent`).
    """

    system: str
    prompt: str
    history_frames: int = 5
    answer_tokens: int = 1024
    later: str = ""
    cache: str = "fresh"

    def __post_init__(self) -> None:
        if "{goal}" not in self.prompt:
            raise ValueError("the prompt of agent.json has no {goal}; put it where the task's words belong")
        if self.history_frames < 1:
            raise ValueError(f"history_frames={self.history_frames} shows nothing; use at least 1")
        if self.answer_tokens < 1:
            raise ValueError(f"answer_tokens={self.answer_tokens} leaves no room for an answer; use 1024")
        if self.cache not in ("fresh", "persistent"):
            raise ValueError(f"cache={self.cache!r} of agent.json is unknown; use fresh or persistent")


@dataclass(frozen=True)
class Prompt:
    """One prompt: `inputs` for `model(**inputs)` (input_ids [1, S], attention_mask, mm_token_type_ids, pixel_values,
    image_grid_thw); `spans` [start, end) of its screenshots, oldest first, the current one last; their `frames`;
    `pictures`, digests of those whose pixels are in `inputs`, by which `agentkv.tower` knows them again."""

    inputs: dict[str, torch.Tensor]
    spans: list[Span]
    frames: list[Frame]
    pictures: Sequence[bytes] = ()

    @property
    def columns(self) -> int:
        """Tokens of the prompt with all its screenshots."""
        return self.inputs["input_ids"].shape[1]

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(rows, columns) of the tokens of each screenshot."""
        return [frame.grid for frame in self.frames]


@dataclass(frozen=True)
class Weightless:
    """In place of a model that is run elsewhere: what a prompt and the reading of an answer need to know of it."""

    config: PreTrainedConfig
    generation_config: GenerationConfig
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, architecture: type[PreTrainedModel], source: str) -> Weightless:
        """By the files at a folder or hub id."""
        config = architecture.config_class.from_pretrained(source)
        try:
            return cls(config, GenerationConfig.from_pretrained(source))
        except OSError:  # no generation_config.json: the model has what its config says
            return cls(config, GenerationConfig.from_model_config(config))


class ModelAdapter(Protocol):
    """One model with its tokenizer and image processor; `history_frames` = screenshots per prompt that it was
    trained for, `answer_tokens` = the longest answer that it is given room for, `cache` = see `AgentText`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processor: Any
    history_frames: int
    answer_tokens: int
    cache: str

    def prompt(
        self, goal: str, history: History, screenshot: Image.Image, css_size: tuple[int, int] | None = None
    ) -> Prompt:
        """The prompt for one decision. css_size: (width, height) of the viewport, if the screenshots have more
        pixels than that. A screenshot may know its page's address: `screenshot.info[ADDRESS]`.
        """
        ...

    def words_of(self, answer: Sequence[int]) -> str:
        """The text of an answer's token ids, without the tokens that end a turn."""
        ...

    def read(self, text: str, frame: Frame) -> Reading | ParseError:
        """What `text` says, in CSS pixels, or why there is nothing to do; never raises."""
        ...

    def parse(self, text: str, frame: Frame) -> Action | ParseError:
        """The same as one step."""
        ...

    def render(self, action: Action, frame: Frame) -> str:
        """`action` in the model's words."""
        ...
