"""Adapter of the Qwen2.5-VL family: Qwen2.5-VL, UI-TARS-1.5 and the embedded mini model, from any local folder or hub
id.

A prompt is ChatML: one system line; per step of the history a user turn with its screenshot and an assistant turn
with its answer (steps without a screenshot are answers only); last the current screenshot and the goal. The words
around the goal come from `agent.json` in the model's folder; without it from UI_TARS. The goal and the answers are
data: chat markers in them are defused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.utils import cached_file

from agentkv.grammars import Frame, ParseError, ui_tars
from agentkv.models.base import History, Prompt
from agentkv.spans import find_spans
from envs.actions import Action

MODEL_TYPE = "qwen2_5_vl"
PLACEHOLDER = "<|image_pad|>"
_MARKERS = (
    PLACEHOLDER,
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
)


@dataclass(frozen=True)
class AgentText:
    """The fixed words of a prompt. `prompt` holds `{goal}`; `history_frames` counts screenshots, the current one
    included.
    """

    system: str
    prompt: str
    history_frames: int = 5

    def __post_init__(self) -> None:
        if "{goal}" not in self.prompt:
            raise ValueError("the prompt of agent.json has no {goal}; put it where the task's words belong")
        if self.history_frames < 1:
            raise ValueError(f"history_frames={self.history_frames} shows nothing; use at least 1")


UI_TARS = AgentText(
    system="You are a helpful assistant.",
    prompt="""You operate a web page. You get a task, your earlier actions and screenshots.
Say the next action that brings the task forward.

## Output Format
Thought: ...
Action: ...

## Action Space
click(start_box='<|box_start|>(x1,y1)<|box_end|>')
left_double(start_box='<|box_start|>(x1,y1)<|box_end|>')
right_single(start_box='<|box_start|>(x1,y1)<|box_end|>')
drag(start_box='<|box_start|>(x1,y1)<|box_end|>', end_box='<|box_start|>(x3,y3)<|box_end|>')
hotkey(key='')
type(content='')  # end with \\n to submit
scroll(start_box='<|box_start|>(x1,y1)<|box_end|>', direction='down or up or right or left')
wait()  # let the page load, then look again
finished(content='')  # escape ', \" and line breaks in content
call_user()  # ask for help when the task cannot be done

## Note
- Write a short plan in Thought and name the element that the action is for.

## User Instruction
{goal}""",
)


class QwenVLAdapter:
    """One Qwen2.5-VL model as an agent (`agentkv.models.ModelAdapter`)."""

    def __init__(self, model: Any, tokenizer: Any, processor: Any, text: AgentText = UI_TARS) -> None:
        self.model, self.tokenizer, self.processor, self.text = model, tokenizer, processor, text
        self.history_frames = text.history_frames

    @classmethod
    def load(
        cls, source: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> QwenVLAdapter:
        """Load from a folder or hub id; dtype None = as saved. Text and image processor are read one by one, because
        the joint processor also wants the video processor and with it torchvision.
        """
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            source, dtype=dtype or "auto", attn_implementation="sdpa", use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
        processor = AutoImageProcessor.from_pretrained(source)
        return cls(model.to(device or "cpu").eval(), tokenizer, processor, _agent_text(source))

    def prompt(
        self, goal: str, history: History, screenshot: Image.Image, css_size: tuple[int, int] | None = None
    ) -> Prompt:
        """The prompt for one decision; see `ModelAdapter.prompt`. Tensors are on the model's device."""
        images = [image for image, _ in history if image is not None] + [screenshot]
        seen = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        grids, merge = seen["image_grid_thw"], self.processor.merge_size
        ids = self._ids(goal, history, [int(g.prod()) // merge**2 for g in grids])
        token = self.model.config.image_token_id
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == token).int(),
            "pixel_values": seen["pixel_values"].to(self.model.dtype),
            "image_grid_thw": grids,
        }
        frames = [self._frame(image, grid.tolist(), css_size) for image, grid in zip(images, grids, strict=True)]
        spans = find_spans(ids, grids, token, merge)[0]
        return Prompt({name: tensor.to(self.model.device) for name, tensor in inputs.items()}, spans, frames)

    def _ids(self, goal: str, history: History, sizes: list[int]) -> torch.Tensor:
        """Token ids [1, S] of the chat with every placeholder repeated as often as its screenshot has visual tokens."""
        text = self.tokenizer.apply_chat_template(
            self._messages(goal, history), tokenize=False, add_generation_prompt=True
        )
        pieces = text.split(PLACEHOLDER)
        if len(pieces) != len(sizes) + 1:
            raise ValueError(
                f"the chat template placed {len(pieces) - 1} screenshots of {len(sizes)}; is it Qwen2.5-VL's?"
            )
        text = pieces[0] + "".join(PLACEHOLDER * n + after for n, after in zip(sizes, pieces[1:], strict=True))
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]

    def _messages(self, goal: str, history: History) -> list[dict[str, Any]]:
        picture = {"type": "image"}
        messages: list[dict[str, Any]] = [{"role": "system", "content": self.text.system}]
        for image, answer in history:
            if image is not None:
                messages.append({"role": "user", "content": [picture]})
            messages.append({"role": "assistant", "content": _defuse(answer)})
        words = {"type": "text", "text": self.text.prompt.replace("{goal}", _defuse(goal))}
        return [*messages, {"role": "user", "content": [picture, words]}]

    def _frame(self, image: Image.Image, grid: list[int], css_size: tuple[int, int] | None) -> Frame:
        _, rows, columns = grid
        patch, merge = self.processor.patch_size, self.processor.merge_size
        return Frame(css_size or image.size, (columns * patch, rows * patch), (rows // merge, columns // merge))

    def parse(self, text: str, frame: Frame) -> Action | ParseError:
        """The first action of a reply (`agentkv.grammars.ui_tars.parse`)."""
        return ui_tars.parse(text, frame)

    def render(self, action: Action, frame: Frame) -> str:
        """`action` as UI-TARS says it (`agentkv.grammars.ui_tars.render`)."""
        return ui_tars.render(action, frame)


def _defuse(text: str) -> str:
    """Chat markers inside page or model text become plain words, so that data cannot open a turn or claim a
    screenshot.
    """
    for marker in _MARKERS:
        text = text.replace(marker, marker.replace("|", " "))
    return text


def _agent_text(source: str) -> AgentText:
    """agent.json of the model's folder (system, prompt, history_frames; other keys are notes), else UI_TARS."""
    path = cached_file(source, "agent.json", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return UI_TARS
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    return AgentText(**{key: found[key] for key in ("system", "prompt", "history_frames") if key in found})
