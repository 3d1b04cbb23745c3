"""Replies as checkpoints write them when they stray from their prompts: what is meant beyond doubt is done, all else is
refused with a reason, and no text is typed that was not meant as text.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentkv.envs.actions import (
    Action,
    Click,
    Drag,
    Finished,
    Goto,
    Hotkey,
    MiddleClick,
    RightClick,
    Scroll,
    Several,
    Type,
    Wait,
)
from agentkv.grammars import fuzz
from agentkv.grammars.base import Frame, ParseError, Reading

FRAME = Frame((1000, 1000), (1000, 1000))
CLICK = Click(10, 20)
Expected = Action | str  # an action, or words of the refusal


def check(grammar: str, text: str, expected: Expected, left_out: str = "") -> None:
    found = fuzz.GRAMMARS[grammar].read(text, FRAME)
    if isinstance(expected, str):
        assert isinstance(found, ParseError) and expected in found.reason, found
    else:
        assert isinstance(found, Reading), found
        assert found.action == expected and (left_out in found.left_out if left_out else found.left_out == "")


CALL = "click(start_box='(10,20)')"
UI_TARS: list[tuple[str, Expected]] = [
    *((form.replace("CALL", CALL), CLICK) for form in (
        "```\nThought: x\nAction: CALL\n```", "Thought: x\nAction:\nCALL", "Thought: x\nAction:\n```\nCALL\n```",
        "Action: ```CALL```", "Action: `CALL`", "**Action:** CALL", "**Action**: CALL", "### Action: CALL",
        "> Action: CALL", "action: CALL", "Thought: x\nCALL", "Thought: x\n\n  CALL  ",
        "Thought: x\n```python\nCALL\n```",
        "Thought: the Action: field\nAction: CALL", "Thought: type(content='evil')\nAction: CALL",
        "<think>Action: wait()</think>\nAction: CALL", "Step 1:\nThought: x\nAction: CALL<|im_end|>",
    )),
    *((f"Action: {call}", CLICK) for call in (
        "Click(start_box='(10,20)')", "LEFT_CLICK(start_box='(10,20)')", "click（start_box='（10，20）'）",
        "click(start_box=‘(10,20)’)", "click(start_box=“(10,20)”)", "click(start_box='((0,10),(20,30))')",
        "click(start_box='<|box_start|>(0,10),(20,30)<|box_end|>')", "click(start_box='[[0,10],[20,30]]')",
        "click(start_box='(10,20)'", "click(start_box=(10,20)", "click(start_box='(10,20)', end_box='')",
        "click(start_box='(10,20)', force=True)", "click(point='<point>10, 20</point>')",
    )),
    ("Action: middle_click(start_box='(10,20)')", MiddleClick(10, 20)),
    ("Action: left_click_drag(start_box='(1,2)', end_box='(3,4)')", Drag(1, 2, 3, 4)),
    ("Action: type(content=“hello”)", Type("hello")),
    ("Action: type(content='hello', submit=True)", Type("hello")),
    ("Action: type(content='a')\nAction: hotkey(key='enter')", Several((Type("a"), Hotkey(("Enter",))))),
    ("Action: `type(content='a')`\nAction: `hotkey(key='enter')`", Several((Type("a"), Hotkey(("Enter",))))),
    ("Action: type(content='说“好”，然后（走）')", Type("说“好”，然后（走）")),
    ("Action: type(content='设a=1，b='2'')", Type("设a=1，b='2'")),
    ("Action: navigate(content='a.org/x')", Goto("https://a.org/x")),
    ("Action: finished(content='[1] (2) {3}: it's “so”')", Finished("[1] (2) {3}: it's “so”")),
    ("Action: wait(time='5s')", Wait(5)),
    ("Action: hotkey(key='ctrl+shift+t')", Hotkey(("Control", "Shift", "t"))),
    ("Action: hotkey(key='arrow left')", Hotkey(("ArrowLeft",))),
    ("Action: type(content=“he said “hi””)", "expected a quoted value"),
    ("Action: type(content='hello'", "does not end"),
    ("Action: type(content='hello)", "does not end"),
    ("Action: type('hello')", "expected an argument"),
    ("Action: type(text='hello')", "type needs content"),
    ("Action: type(content=hello world)", "expected ','"),
    ("Action: navigate(content='a.org", "does not end"),
    ("Action: click(start_box='(10%,20%)')", "is not a point"),
    ("Action: click(start_box='(1200,20)')", "x=1200 is outside"),
    ("Action: click(x=10, y=20)", "click needs start_box"),
    ("Action: drag(start='(1,2)', end='(3,4)')", "drag needs start_box"),
    ("Action: scroll(direction='down or up')", "is not one of up, down"),
    ("Thought: I will click. click(start_box='(10,20)')", "is not an action"),
    ("Thought: either\ntype(content='a')\nor not.", "words stand behind the call"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), UI_TARS)
def test_ui_tars(text: str, expected: Expected) -> None:
    check("ui_tars", text, expected)


def said(**arguments: Any) -> str:
    return json.dumps({"name": "computer_use", "arguments": arguments}, ensure_ascii=False)


PRESS = said(action="left_click", coordinate=[10, 20])
TWICE = json.dumps({"name": "computer_use", "arguments": json.dumps(json.loads(PRESS)["arguments"])})
PRETTY = json.dumps(json.loads(PRESS), indent=2)
WRAPPED = {
    "tags": f"<tool_call>\n{PRESS}\n</tool_call>",
    "fence inside": f"<tool_call>\n```json\n{PRESS}\n```\n</tool_call>",
    "fence alone": f"Now.\n```json\n{PRESS}\n```",
    "pretty fence": f"```json\n{PRETTY}\n```",
    "pretty alone": f"I click.\n\n{PRETTY}",
    "comma too many": f"<tool_call>\n{PRESS[:-1]},}}\n</tool_call>",
    "brace too many": f"<tool_call>\n{PRESS}}}\n</tool_call>",
    "comment behind": f"<tool_call>\n{PRESS} // click\n</tool_call>",
    "half of the tags": f"{PRESS}\n</tool_call>",
    "thought": f"<think>\n<tool_call>no</tool_call>\n</think>\n\n<tool_call>\n{PRESS}\n</tool_call>",
    "end of a thought": f"so</think><tool_call>{PRESS}</tool_call>",
    "arguments as text": f"<tool_call>{TWICE}</tool_call>",
}


@pytest.mark.parametrize("grammar", ["tool_call", "tool_call_xml", "gui_owl", "evocua_s2", "fara"])
@pytest.mark.parametrize("how", WRAPPED)
def test_calls_in_any_wrapping(grammar: str, how: str) -> None:
    check(grammar, WRAPPED[how], CLICK)


ARGUMENTS: list[tuple[dict[str, Any], Expected]] = [
    *(({"action": "left_click", "coordinate": point}, CLICK) for point in (
        [10.0, 20.0], ["10", "20"], "[10, 20]", "(10, 20)", "10, 20", "（10，20）", "<|box_start|>(10,20)<|box_end|>",
        "<|box_start|>(0,10),(20,30)<|box_end|>", [0, 10, 20, 30], "((10,20))",
    )),
    *(({"action": "left_click", key: [10, 20]}, f"has no '{key}'; its point is called coordinate")
      for key in ("coordinates", "point", "position", "start_box", "center")),
    ({"action": "left_click", "x": 10, "y": 20}, "has no 'x'"),
    ({"action": "left_click", "arguments": {"coordinate": [10, 20]}}, "has no 'arguments'"),
    ({"action": "left_click", "coordinate": [-5, 20]}, Click(0, 20)),
    ({"action": "left_click", "coordinate": [1500, 20]}, "x=1500 is outside"),
    ({"action": "left_click", "coordinate": ["10%", "20%"]}, "not a number"),
    ({"action": "left_click", "coordinate": [[10, 20], [30, 40]]}, "not a number"),
    ({"action": "left_click", "coordinate": None}, Click()),
    ({"action": "left_click", "button": "left"}, Click()),
    ({"action": "left_click_drag", "coordinate": [1, 2], "coordinate2": [3, 4]}, Drag(1, 2, 3, 4)),
    ({"action": "left_click_drag", "coordinate": [1, 2], "target_coordinate": [3, 4]}, "has no 'target_coordinate'"),
    ({"action": "left_click_drag", "startCoordinate": [1, 2], "endCoordinate": [3, 4]}, "has no 'startCoordinate'"),
    ({"action": "key", "keys": ["ctrl+shift+t"]}, Hotkey(("Control", "Shift", "t"))),
    ({"action": "key", "text": "page down"}, Hotkey(("PageDown",))),
    ({"action": "key", "keys": ["cmd", "c"]}, Hotkey(("Meta", "c"))),
    ({"action": "key", "keys": ["{ctrl}"]}, "is not a key"),
    ({"action": "wait", "time": "2s"}, Wait(2)),
    ({"action": "terminate", "status": "completed"}, "is not success"),
    ({"action": "leftClick", "coordinate": [1, 2]}, "is not an action"),
    ({"action": "screenshot"}, "is not an action"),
]  # fmt: skip


@pytest.mark.parametrize("grammar", ["tool_call", "gui_owl", "evocua_s2", "fara"])
@pytest.mark.parametrize(("arguments", "expected"), ARGUMENTS)
def test_arguments_in_any_form(grammar: str, arguments: dict[str, Any], expected: Expected) -> None:
    check(grammar, f"<tool_call>\n{said(**arguments)}\n</tool_call>", expected)


@pytest.mark.parametrize("grammar", ["tool_call", "gui_owl", "evocua_s2"])
def test_texts_and_wheels_of_computer_use(grammar: str) -> None:
    for arguments, expected in (
        ({"action": "type", "text": "say {x} [y] 'z' 😀"}, Type("say {x} [y] 'z' 😀")),
        ({"action": "type", "text": 4.5}, "text is float"),
        ({"action": "type", "text": ["a"]}, "text is list"),
        ({"action": "type", "content": "a"}, "type needs text"),
        ({"action": "scroll", "pixels": "-300px"}, Scroll(None, None, "down", 300)),
        ({"action": "scroll", "pixels": -300, "direction": "down"}, Scroll(None, None, "down", 300)),
        ({"action": "scroll", "pixels": 300, "direction": "down"}, "pixels=300 is up, but the direction is 'down'"),
        ({"action": "scroll", "direction": "down"}, "scroll needs pixels"),
        ({"action": "scroll", "pixels": -300, "position": [1, 2]}, "has no 'position'"),
    ):
        check(grammar, f"<tool_call>{said(**arguments)}</tool_call>", expected)


def test_all_calls_of_a_reply_are_done() -> None:
    both = Several((CLICK, RightClick(10, 20)))
    second = PRESS.replace("left_click", "right_click")
    for text in (
        f"<tool_call>{PRESS}\n{second}</tool_call>",
        f"<tool_call>{PRESS}</tool_call>\nand\n<tool_call>{second}</tool_call>",
        f"{PRESS}\n{second}",
        f"{PRESS} {second}",
        f"```json\n{PRESS}\n```\nthen\n```json\n{second}\n```",
    ):
        check("tool_call", text, both)
    check("tool_call", f"<tool_call>{PRESS}\n{{bad}}</tool_call>", CLICK, "a later call was left out")


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ("<parameter=action>left_click</parameter><parameter=coordinate>(10, 20)</parameter></function>", CLICK),
        ("<parameter=action>\nleft_click\n</parameter>\n<parameter=coordinate>\n[10, 20]\n</parameter>", CLICK),
        ('<parameter=action>\ntype\n</parameter>\n<parameter=text>\n  a\n"b"\n</parameter>\n', Type('  a\n"b"')),
        ("<parameter=action>\ntype\n</parameter>\n<parameter=text>\na", "does not end"),
        (
            "<parameter=action>\nkey\n</parameter>\n<parameter=keys>\n['ctrl', 'a']\n</parameter>",
            Hotkey(("Control", "a")),
        ),
    ],
)
def test_xml(inside: str, expected: Expected) -> None:
    check("tool_call_xml", f"<tool_call>\n<function=computer_use>\n{inside}\n</tool_call>", expected)


CODE: list[tuple[str, Expected]] = [
    ("pyautogui.click(x=10, y=20,)", CLICK),
    ("pyautogui.click(\n    x=10,\n    y=20,\n)", CLICK),
    ("    pyautogui.click(10, 20)", CLICK),
    ("pyautogui.click(X=10, Y=20)", "needs x and y, not 'X'"),
    ("pyautogui.click(pos_x=10, pos_y=20)", "needs x and y, not 'pos_x'"),
    ("pyautogui.click(x='10', y='20')", "x is str"),
    ("pyautogui.click((10, 20))", "Tuple is not allowed"),
    ("pyautogui.click(10, 20, button='RIGHT')", RightClick(10, 20)),
    ("pyautogui.scroll(-5.0)", Scroll(None, None, "down", 500)),
    ("pyautogui.scroll(amount=-5)", "clicks is NoneType"),
    ("pyautogui.typewrite(['a', 'enter'])", Several((Hotkey(("a",)), Hotkey(("Enter",))))),
    ("pyautogui.write('it's')", "is not a plain string"),
    ("pyautogui.write('a\nb')", "a string does not end"),
    ("pyautogui.write(‘a’)", "not ASCII"),
    ("pyautogui.write(message=123)", "is int, not text"),
    ("computer.terminate(status='fail')", Finished(status="failure")),
    ("computer.terminate(status='SUCCESS')", Finished()),
    ("pyautogui.dragRel(30, 40)", "is not an action"),
    ("import pyautogui as pg\npg.click(10, 20)", "an import is not allowed"),
]


@pytest.mark.parametrize("grammar", ["opencua", "evocua_s1"])
@pytest.mark.parametrize(("code", "expected"), CODE)
def test_code(grammar: str, code: str, expected: Expected) -> None:
    check(grammar, f"## Action:\nDo it.\n\n## Code:\n```python\n{code}\n```", expected)


def holo(**action: Any) -> str:
    return json.dumps({"note": "n", "thought": "I see {it}.", "action": action})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (holo(action="click_element", element="e", x="10", y="20"), CLICK),
        (holo(action="wait", seconds="2"), Wait(2)),
        (holo(action="goto", url="a.org"), Goto("https://a.org")),
        (f"```json\n{holo(action='click_element', x=10, y=20)}\n```\nDone.", CLICK),
        (json.dumps(json.loads(holo(action="click_element", x=10, y=20)), indent=1), CLICK),
        (holo(action="write_element_abs", content=5, x=1, y=2), "content is int"),
        (holo(action="write_element_abs", content="a"), "x is NoneType"),
        (holo(action="scroll", direction="Down"), "is not one of down"),
        (holo(action="click", x=1, y=2), "is not an action"),
    ],
)
def test_holo(text: str, expected: Expected) -> None:
    check("holo", text, expected)


def test_what_is_passed_over_is_told() -> None:
    check("holo", holo(action="click_element", x=10, y=20) + holo(action="refresh"), CLICK, "was left out")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"action": "type", "text": "a", "press_enter": 0}, Type("a")),
        ({"action": "type", "text": "a", "press_enter": "no"}, "is not true or false"),
        ({"action": "visit_url", "url": "javascript:alert(1)"}, Goto("javascript:alert(1)")),
        ({"action": "visit_url", "url": "localhost:8000"}, Goto("https://localhost:8000")),
        ({"action": "go_back"}, "is not an action"),
    ],
)
def test_fara(arguments: dict[str, Any], expected: Expected) -> None:
    check("fara", f"<tool_call>{said(**arguments)}</tool_call>", expected)


def test_a_swipe_by_its_ends() -> None:
    call = {"action": "swipe", "start_coordinate": [500, 800], "end_coordinate": [500, 200]}
    text = json.dumps({"name": "mobile_use", "arguments": call})
    text = f"<thinking>\nx\n</thinking>\n<tool_call>\n{text}\n</tool_call>"
    check("mai_ui", text, Scroll(500, 800, "down", 600))
