"""Replies in the forms that the makers of GUI-Owl, EvoCUA, MAI-UI, Fara, Holo and Qwen3.5 publish, and the slips of
each family that the shared tables do not have.
"""

from __future__ import annotations

import json

import pytest

from agentkv.envs.actions import (
    Action,
    CallUser,
    Click,
    Drag,
    Finished,
    Goto,
    Hotkey,
    KeyDown,
    KeyUp,
    LongPress,
    Move,
    Note,
    OpenApp,
    PressBack,
    Reload,
    Scroll,
    Several,
    Type,
    Wait,
)
from agentkv.grammars import evocua, fara, gui_owl, holo, mai_ui, tool_call
from agentkv.grammars.base import CoordinateSpace, Frame, Grammar, ParseError

SIZE = (1998, 999)
PIXELS = Frame(SIZE, SIZE)
MILLE = Frame((2000, 1000), SIZE, space=CoordinateSpace.PER_MILLE)
NINES = Frame(SIZE, SIZE, space=CoordinateSpace.TO_999)


def call(tool: str = "computer_use", before: str = "", **arguments: object) -> str:
    return f"{before}<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments})}\n</tool_call>"


def xml(**arguments: str) -> str:
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function=computer_use>\n{inside}</function>\n</tool_call>"


def phone(**arguments: object) -> str:
    return call("mobile_use", "<thinking>\nNow.\n</thinking>\n", **arguments)


def noted(**action: object) -> str:
    return json.dumps({"note": "a price: 3", "thought": "I see {it}.", "action": action})


S2 = "Action: Press the button.\n"
REPLIES: list[tuple[Grammar, Frame, str, Action]] = [
    (evocua.S2, NINES, call(before=S2, action="left_click", coordinate=[500, 250]), Click(1000, 250)),
    (evocua.S2, NINES, call(before=S2, action="left_click", coordinate=[0, 0]), Click(0, 0)),
    (evocua.S2, NINES, call(before=S2, action="scroll", pixels=-5, coordinate=[1, 2]), Scroll(2, 2, "down", 5)),
    (evocua.S2, NINES, call(before=S2, action="terminate", status="success"), Finished()),
    (evocua.S2, NINES, call(before=S2, action="key_down", keys=["ctrl"]), KeyDown("Control")),
    (evocua.S2, NINES, call(before=S2, action="key_up", keys=["ctrl"]), KeyUp("Control")),
    (evocua.S2, NINES, call(before=S2, action="type", text="a\\nb"), Type("a\nb")),
    (evocua.S1, NINES, "## Code:\n```python\npyautogui.click(x=500, y=250)\n```", Click(1000, 250)),
    (gui_owl.GRAMMAR, MILLE, call(before=S2, action="answer", text="42"), Finished("42")),
    (gui_owl.GRAMMAR, MILLE, call(before=S2, action="interact", text="log in?"), CallUser("log in?")),
    (gui_owl.GRAMMAR, MILLE, call(before=S2, action="right click", coordinate=[1, 2]).replace('"', "'"), "right"),
    (gui_owl.GRAMMAR, MILLE, call(before=S2, action="click", coordinate=[500, 500]), Click(1000, 500)),
    (gui_owl.GRAMMAR, MILLE, call(before=S2, action="open app", app_name="Mail"), OpenApp("Mail")),
    (gui_owl.GRAMMAR, MILLE, call(before=S2, action="call_user"), CallUser()),
    (gui_owl.GRAMMAR, MILLE, call(before=S2, action="done"), Finished()),
    (
        gui_owl.GRAMMAR,
        MILLE,
        call("mobile_use", action="swipe", coordinate=[500, 800], coordinate2=[500, 300]),
        Scroll(1000, 800, "down", 500),
    ),
    (mai_ui.GRAMMAR, NINES, phone(action="click", coordinate=[500, 250]), Click(1000, 250)),
    (mai_ui.GRAMMAR, NINES, phone(action="click", coordinate=[400, 200, 600, 300]), Click(1000, 250)),
    (mai_ui.GRAMMAR, NINES, "so\n</think>\n" + call("mobile_use", action="wait"), Wait()),
    (mai_ui.GRAMMAR, NINES, phone(action="long_press", coordinate=[1, 2]), LongPress(2, 2)),
    (mai_ui.GRAMMAR, NINES, phone(action="swipe", direction="up", coordinate=[1, 2]), Scroll(2, 2, "down", 499.5)),
    (mai_ui.GRAMMAR, NINES, phone(action="swipe", direction="left"), Scroll(None, None, "right", 999)),
    (mai_ui.GRAMMAR, NINES, phone(action="open", text="Mail"), OpenApp("Mail")),
    (
        mai_ui.GRAMMAR,
        NINES,
        phone(action="drag", start_coordinate=[1, 2], end_coordinate=[3, 4]),
        Drag(2, 2, 6, 4),
    ),
    (mai_ui.GRAMMAR, NINES, phone(action="system_button", button="back"), PressBack()),
    (mai_ui.GRAMMAR, NINES, phone(action="system_button", button="enter"), Hotkey(("Enter",))),
    (mai_ui.GRAMMAR, NINES, phone(action="terminate", status="fail"), Finished(status="failure")),
    (mai_ui.GRAMMAR, NINES, phone(action="ask_user", text="which?"), CallUser("which?")),
    (
        mai_ui.GRAMMAR,
        NINES,
        '<grounding_think>It is there.</grounding_think>\n<answer>\n{"coordinate":[500,250]}\n</answer>',
        Click(1000, 250),
    ),
    (fara.GRAMMAR, PIXELS, call(before="I click.\n", action="left_click", coordinate=[5, 6]), Click(5, 6)),
    (
        fara.GRAMMAR,
        PIXELS,
        call(action="type", text="tea", coordinate=[5, 6], press_enter=False, delete_existing_text=True),
        Several((Click(5, 6), Hotkey(("Control", "a")), Hotkey(("Delete",)), Type("tea"))),
    ),
    (fara.GRAMMAR, PIXELS, call(action="type", text="tea", coordinate=[5, 6]), Several((Click(5, 6), Type("tea\n")))),
    (fara.GRAMMAR, PIXELS, call(action="type", text="tea", press_enter="False"), Type("tea")),
    (fara.GRAMMAR, PIXELS, call(action="visit_url", url="https://a.org/b"), Goto("https://a.org/b")),
    (fara.GRAMMAR, PIXELS, call(action="visit_url", url="a.org"), Goto("https://a.org")),
    (fara.GRAMMAR, PIXELS, call(action="visit_url", url="a b"), Goto("https://www.bing.com/search?q=a+b&FORM=QBLH")),
    (
        fara.GRAMMAR,
        PIXELS,
        call(action="web_search", query="é"),
        Goto("https://www.bing.com/search?q=%C3%A9&FORM=QBLH"),
    ),
    (fara.GRAMMAR, PIXELS, call(action="history_back"), PressBack()),
    (fara.GRAMMAR, PIXELS, call(action="refresh"), Reload()),
    (fara.GRAMMAR, PIXELS, call(action="pause_and_memorize_fact", fact="it costs 3"), Note("it costs 3")),
    (fara.GRAMMAR, PIXELS, call(action="scroll", pixels=-400), Scroll(None, None, "down", 999)),
    (fara.GRAMMAR, PIXELS, call(action="wait"), Wait(3)),
    (fara.GRAMMAR, PIXELS, call(before="It is 3.\n", action="terminate", status="success"), Finished("It is 3.")),
    (fara.GRAMMAR, PIXELS, call(before="No.\n", action="terminate", status="failure"), Finished(status="failure")),
    (holo.GRAMMAR, PIXELS, noted(action="click_element", element="it", x=5, y=6), Click(5, 6)),
    (
        holo.GRAMMAR,
        PIXELS,
        f"```json\n{noted(action='write_element_abs', content='tea', element='it', x=5, y=6)}\n```",
        Several((Click(5, 6), Type("tea\n"))),
    ),
    (holo.GRAMMAR, PIXELS, noted(action="scroll", direction="up"), Scroll(None, None, "up", 500)),
    (holo.GRAMMAR, PIXELS, noted(action="go_back"), PressBack()),
    (holo.GRAMMAR, PIXELS, noted(action="refresh"), Reload()),
    (holo.GRAMMAR, PIXELS, noted(action="goto", url="https://a.org"), Goto("https://a.org")),
    (holo.GRAMMAR, PIXELS, noted(action="wait"), Wait(2)),
    (holo.GRAMMAR, PIXELS, noted(action="answer", content="3"), Finished("3")),
    (tool_call.XML, MILLE, xml(action="left_click", coordinate="[500, 250]"), Click(1000, 250)),
    (tool_call.XML, MILLE, xml(action="type", text="a <b>\n"), Type("a <b>\n")),
    (tool_call.XML, MILLE, xml(action="key", keys='["ctrl", "a"]'), Hotkey(("Control", "a"))),
    (tool_call.XML, MILLE, xml(action="scroll", pixels="-300"), Scroll(None, None, "down", 300)),
    (tool_call.XML, MILLE, "<think>\nhm\n</think>\n\n" + xml(action="terminate", status="success"), Finished()),
    (tool_call.XML, MILLE, xml(action="mouse_move", coordinate="[1, 1]") + xml(action="left_click"), Click(2, 1)),
]


@pytest.mark.parametrize(("grammar", "frame", "text", "action"), REPLIES)
def test_published_forms_are_read(grammar: Grammar, frame: Frame, text: str, action: Action | str) -> None:
    found = grammar.parse(text, frame)
    if action == "right":
        assert type(found).__name__ == "RightClick"
    elif isinstance(action, Click):
        assert isinstance(found, Click) and (found.x, found.y) == pytest.approx((action.x, action.y), abs=1)
    elif isinstance(action, Drag | LongPress | Move | Scroll):
        assert type(found) is type(action)
        assert [v for v in vars(found).values()] == [
            v if v is None or isinstance(v, str) else pytest.approx(v, abs=1) for v in vars(action).values()
        ]
    else:
        assert found == action


@pytest.mark.parametrize(
    ("grammar", "text", "why"),
    [
        (gui_owl.GRAMMAR, call("browser_use", action="click", label=3), "points at labels drawn on the screenshot"),
        (mai_ui.GRAMMAR, call("maps_search", action="find"), "'maps_search' is not a tool"),
        (holo.GRAMMAR, noted(action="restart"), "a running task cannot begin anew"),
        (tool_call.XML, xml(action="type", text="a").replace("\n</parameter>\n</function>", ""), "does not end"),
    ],
)
def test_what_cannot_be_done_says_why(grammar: Grammar, text: str, why: str) -> None:
    refused = grammar.parse(text, NINES)
    assert isinstance(refused, ParseError) and why in refused.reason


def test_the_far_edge_of_999_is_inside_the_viewport() -> None:
    found = evocua.S2.parse(call(action="left_click", coordinate=[999, 999]), NINES)
    assert isinstance(found, Click) and 1997 < found.x < 1998 and 998 < found.y < 999  # type: ignore[operator]
    assert NINES.from_css(found.x, found.y) == (999, 999)  # type: ignore[arg-type]


# every action that the makers' prompts list, with the arguments that they list for it
POINT = {"coordinate": [1, 2]}
CLICKS = ("mouse_move", "left_click", "left_click_drag", "right_click", "middle_click", "double_click", "triple_click")
COMPUTER = {name: POINT for name in CLICKS} | {"key": {"keys": ["ctrl", "c"]}, "type": {"text": "a"}}
COMPUTER |= {"scroll": {"pixels": -5}, "hscroll": {"pixels": 5}, "wait": {"time": 1}, "answer": {"text": "a"}}
COMPUTER |= {"terminate": {"status": "success"}}
OWL = {"interact": {"text": "a"}, "click": {"coordinate": [1, 2]}, "right click": {"coordinate": [1, 2]}}
OWL |= {"drag": {"coordinate": [1, 2], "coordinate2": [3, 4]}, "open app": {"app_name": "a"}}
OWL |= {"call_user": {}, "stop": {}, "done": {}}
MAI = {"click": POINT, "long_press": {"coordinate": [1, 2, 3, 4]}, "double_click": POINT, "type": {"text": "a"}}
MAI |= {"swipe": {"direction": "up"}, "open": {"text": "a"}, "wait": {}, "system_button": {"button": "enter"}}
MAI |= {"drag": {"start_coordinate": [1, 2], "end_coordinate": [3, 4]}, "terminate": {"status": "fail"}}
MAI |= {"answer": {"text": "a"}, "ask_user": {"text": "a"}}
FARA = {"key": {"keys": ["Enter"]}, "type": POINT | {"text": "a", "press_enter": True, "delete_existing_text": True}}
FARA |= {"mouse_move": POINT, "left_click": POINT, "scroll": {"pixels": 5}, "visit_url": {"url": "https://a.org"}}
FARA |= {"web_search": {"query": "a"}, "history_back": {}, "pause_and_memorize_fact": {"fact": "a"}}
FARA |= {"wait": {"time": 1}, "terminate": {"status": "success"}}
HELD = {"key_down": {"keys": ["ctrl"]}, "key_up": {"keys": ["ctrl"]}}


@pytest.mark.parametrize(
    ("grammar", "tool", "listed"),
    [
        (evocua.S2, "computer_use", COMPUTER | HELD),
        (gui_owl.GRAMMAR, "computer_use", COMPUTER | HELD | OWL),
        (tool_call.GRAMMAR, "computer_use", COMPUTER),
        (mai_ui.GRAMMAR, "mobile_use", MAI),
        (fara.GRAMMAR, "computer_use", FARA),
    ],
)
def test_every_action_that_the_makers_list_is_read(grammar: Grammar, tool: str, listed: dict[str, dict]) -> None:
    for name, arguments in listed.items():
        reading = grammar.read(call(tool, action=name, **arguments), NINES)
        assert not isinstance(reading, ParseError) and reading.flags == frozenset(), (name, reading)
