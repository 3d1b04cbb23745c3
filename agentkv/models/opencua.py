"""OpenCUA: a Kimi-style chat, answers in pyautogui lines, points in pixels of the resized image.

The published tokenizer is Python code on top of `tiktoken.model`, which we do not run. What we need instead is a
`tokenizer.json` beside the weights, made once from that file: transformers' `TikTokenConverter` (in
`transformers.convert_slow_tokenizer`) takes `tiktoken.model`, the pattern from the published tokenizer, and the special
tokens of tokenizer_config.json in the order of their ids; `.converted().save("tokenizer.json")` writes it.
"""

from __future__ import annotations

import json
import re

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from agentkv.grammars import opencua
from agentkv.models.base import AgentText
from agentkv.models.chat import ChatAdapter
from agentkv.models.opencua_model import OpenCuaForConditionalGeneration
from textkv.checkpoints import load_tokenizer

TEXT_HISTORY = 10
"""Answers of more than this many steps ago leave the chat."""

_FUNCTIONS = (
    {
        "name": "computer.triple_click",
        "description": "Click three times at a point, which marks a whole line.",
        "parameters": {
            "type": "object",
            "properties": {
                "x": {"type": "number", "description": "Pixels from the left edge."},
                "y": {"type": "number", "description": "Pixels from the top edge."},
            },
            "required": ["x", "y"],
        },
    },
    {
        "name": "computer.wait",
        "description": "Let the page load, then look again.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
    {
        "name": "computer.terminate",
        "description": "End the task and say how it ended.",
        "parameters": {
            "type": "object",
            "properties": {"status": {"type": "string", "enum": ["success", "failure"], "description": "The outcome."}},
            "required": ["status"],
        },
    },
)

OPENCUA = AgentText(
    system=f"""You operate a web page with mouse and keyboard. You get a task, what you did so far, and screenshots of \
{{width}} x {{height}} pixels. For each step answer in this form:

## Thought:
What the screenshot shows, whether the last action worked, and what comes next.

## Action:
One sentence that names the next action and the element that it is for.

## Code:
```python
One pyautogui call, or one of the functions below
```

Points are pixels of the last screenshot. Besides pyautogui there are:
{chr(10).join(json.dumps(function) for function in _FUNCTIONS)}""",
    prompt="""# Task Instruction:
{goal}

Write the next step that brings this task forward.
""",
    history_frames=3,
)

_CODE = re.compile(r"\n*## Code:\s*```.*?```[ \t]*", re.DOTALL)


class OpenCuaAdapter(ChatAdapter):
    """One OpenCUA model as an agent (`agentkv.models.ModelAdapter`)."""

    model_type = "opencua"
    architecture = OpenCuaForConditionalGeneration
    words = OPENCUA
    grammar = opencua.GRAMMAR
    placeholder = "<|media_placeholder|>"
    markers = (
        placeholder,
        "<|media_begin|>",
        "<|media_content|>",
        "<|media_end|>",
        "<|im_system|>",
        "<|im_user|>",
        "<|im_assistant|>",
        "<|im_middle|>",
        "<|im_end|>",
        "[BOS]",
        "[EOS]",
        "[PAD]",
    )
    chat_template = (
        "{% for message in messages %}"
        "{{ '<|im_' + message['role'] + '|>' + message['role'] + '<|im_middle|>' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}"
        "{{ '<|media_begin|>image<|media_content|><|media_placeholder|><|media_end|>' }}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_assistant|>assistant<|im_middle|>' }}{% endif %}"
    )

    @classmethod
    def _tokenizer(cls, source: str) -> PreTrainedTokenizerBase:
        if cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False) is None:
            raise FileNotFoundError(
                f"{source} has no tokenizer.json, only a tokenizer that is Python code (TikTokenV3); this package runs "
                "no code of a checkpoint: make tokenizer.json from its tiktoken.model with transformers' "
                "TikTokenConverter (see agentkv/models/opencua.py)"
            )
        return load_tokenizer(PreTrainedTokenizerFast.from_pretrained, source)

    def reply(self, thought: str, summary: str, call: str) -> str:
        """Thought, action and code under their headings; one that is "" has none."""
        parts = [f"## {name}:\n{text}" for name, text in (("Thought", thought), ("Action", summary)) if text]
        return "\n\n".join([*parts, call])

    def _answer(self, answer: str, age: int, number: int) -> str | None:
        return step_answer(answer, age, number)


def step_answer(answer: str, age: int, number: int) -> str | None:
    """A step's thought and action under its number; the code stays out, as in training, and old steps altogether."""
    if age > TEXT_HISTORY:
        return None
    said = _CODE.sub("\n", answer).strip()
    return f"# Step {number}:\n{said or answer}\n"
