"""UI-TARS-1.5 and the embedded mini model: the architecture and the chat of Qwen2.5-VL, but other words.

The task stands in the user's turn together with the list of actions, the answer is `Thought: ... Action: click(...)`,
points are pixels of the resized image.
"""

from __future__ import annotations

import re

from agentkv.grammars import ui_tars
from agentkv.models.base import AgentText
from agentkv.models.qwen_vl import QwenVLAdapter

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


class UiTarsAdapter(QwenVLAdapter):
    """One UI-TARS-1.5 model as an agent (`agentkv.models.ModelAdapter`)."""

    known_by = ("uitars",)
    words = UI_TARS
    grammar = ui_tars.GRAMMAR

    def _answer(self, answer: str, age: int, number: int) -> str | None:
        """Points between box tokens, as the authors' client shows them to the model again, where the prompt asks for
        them.
        """
        if _BOX[0] not in self.text.prompt:
            return answer
        return _POINT.sub(lambda point: f"{point[1]}{_BOX[0]}{point[2]}{_BOX[1]}{point[3]}", answer)


_BOX = ("<|box_start|>", "<|box_end|>")
_POINT = re.compile(r"((?:start_box|end_box|start_point|end_point|point)=')(\([0-9., ]{1,40}\))(')")
