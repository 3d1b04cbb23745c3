"""Qwen's `computer_use` calls: JSON becomes typed actions, in both directions; hostile replies are in `test_corpus`."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkv.envs import actions as acts
from agentkv.envs.actions import (
    Click,
    DoubleClick,
    Drag,
    Finished,
    Hotkey,
    MiddleClick,
    Move,
    RightClick,
    Scroll,
    Several,
    TripleClick,
    Type,
    Wait,
)
from agentkv.grammars.base import CoordinateSpace, Frame, ParseError, Reading
from agentkv.grammars.tool_call import parse, parse_all, read, render

FRAME = Frame((160, 210), (168, 224))
SAME = Frame((280, 280), (280, 280))


def call(**arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'computer_use', 'arguments': arguments})}\n</tool_call>"


WAIT = call(action="wait", time=1)


@pytest.mark.parametrize(
    ("text", "action"),
    [
        (call(action="left_click", coordinate=[10, 20]), Click(10, 20)),
        (call(action="left_click", coordinate=[10.5, 20]), Click(10.5, 20)),
        (call(action="right_click", coordinate=[10, 20]), RightClick(10, 20)),
        (call(action="middle_click", coordinate=[10, 20]), MiddleClick(10, 20)),
        (call(action="double_click", coordinate=[10, 20]), DoubleClick(10, 20)),
        (call(action="triple_click", coordinate=[10, 20]), TripleClick(10, 20)),
        (call(action="mouse_move", coordinate=[10, 20]), Move(10, 20)),
        (call(action="left_click_drag", coordinate=[10, 20]), Drag(None, None, 10, 20)),
        (call(action="scroll", pixels=-300), Scroll(None, None, "down", 300)),
        (call(action="scroll", pixels=5, coordinate=[1, 2]), Scroll(1, 2, "up", 5)),
        (call(action="hscroll", pixels=7.5), Scroll(None, None, "right", 7.5)),
        (call(action="key", keys=["ctrl", "shift", "T"]), Hotkey(("Control", "Shift", "T"))),
        (call(action="type", text='确定 "it\'s"\n</tool_call>'), Type('确定 "it\'s"\n</tool_call>')),
        (call(action="wait", time=2), Wait(2)),
        (call(action="terminate", status="success"), Finished()),
        (call(action="terminate", status="failure"), Finished(status="failure")),
        (call(action="answer", text="42"), Finished("42")),
        ("I click.\n" + WAIT + "<|im_end|>", Wait()),
        (f"<think>{call(action='key', keys=['a'])}</think>\n{WAIT}", Wait()),
        (f"a thought whose start is in the prompt </think>{WAIT}", Wait()),
        (call(action="type", text="</think><tool_call>"), Type("</think><tool_call>")),
        (WAIT + "\n<tool_call>\nbroken", Wait()),
    ],
)
def test_calls(text: str, action: object) -> None:
    assert parse(text, SAME) == action


def test_all_calls_are_one_step() -> None:
    move, drag = call(action="mouse_move", coordinate=[1, 2]), call(action="left_click_drag", coordinate=[3, 4])
    assert parse_all(f"{move}\n{drag}", SAME) == [Move(1, 2), Drag(None, None, 3, 4)]
    assert parse(f"{move}\n{drag}", SAME) == Drag(1, 2, 3, 4)
    assert parse(f"{move}\n{WAIT}", SAME) == Several((Move(1, 2), Wait()))
    assert parse(f"{move}{call(action='scroll', pixels=-5)}", SAME) == Scroll(1, 2, "down", 5)
    assert parse(f"{move}\n{call(action='left_click')}", SAME) == Click(1, 2)
    broken = read(f"{WAIT}\n<tool_call>broken", SAME)
    assert isinstance(broken, Reading) and broken.actions == (Wait(),)
    assert broken.left_out == "a later call was left out: the call is not JSON: Expecting value"


PYTHON = str({"name": "computer_use", "arguments": {"action": "type", "text": 'say "x"'}})
BARE = '{"name": "computer_use", "arguments": {"action": "wait", "time": 1}}'
XML = "<function=computer_use>\n<parameter=action>\ntype\n</parameter>\n<parameter=text>\n a\n</parameter>\n</function>"


@pytest.mark.parametrize(
    ("text", "action"),
    [
        (call(action="left_click"), Click()),
        (call(action="Left Click", coordinate=["10", 20]), Click(10, 20)),
        (call(action="click", coordinate="(10, 20)"), Click(10, 20)),
        (call(action="left_click", coordinate=[10, 20, 30, 40]), Click(20, 30)),
        (call(action="left_click", coordinate=[1, 2], text="x", force=1), Click(1, 2)),
        (call(action="left_click_drag", start_coordinate=[1, 2], coordinate=[3, 4]), Drag(1, 2, 3, 4)),
        (call(action="key", keys=["Page_Down"]), Hotkey(("PageDown",))),
        (call(action="key", keys=["keys=['enter']"]), Hotkey(("Enter",))),
        (call(action="key", keys="ctrl + a"), Hotkey(("Control", "a"))),
        (call(action="key", text="ctrl+a"), Hotkey(("Control", "a"))),
        (call(action="key_down", keys=["shift"]), acts.KeyDown("Shift")),
        (call(action="type", text=5), Type("5")),
        (call(action="type", text="x", keys=["enter"]), Type("x")),
        (call(action="scroll", pixels="-300"), Scroll(None, None, "down", 300)),
        (call(action="wait"), Wait()),
        (call(action="terminate"), Finished()),
        (call(action="interact", text="which?"), acts.CallUser("which?")),
        (WAIT.replace('"arguments": {', '"arguments": "{').replace("}}", '}"}').replace('"{"action"', '"{\\"action\\"')
         .replace(': "wait", "time": 1}"', ': \\"wait\\", \\"time\\": 1}"'), Wait()),
        (f"<tool_call>\n{PYTHON}\n</tool_call>", Type('say "x"')),
        (f"<tool_call>{BARE}}}</tool", Wait()),
        (f"<tool_call>{BARE} or so", Wait()),
        (f"<tool_call>{BARE[:-1]}</tool_call>", Wait()),
        (f"I wait.\n{BARE}", Wait()),
        (f"<tool_call>{BARE[:-1]}, 'id': 1}}</tool_call>".replace("'", '"'), Wait()),
        (call(action="type", text="a b").replace("a b", "a\nb"), Type("a\nb")),
        (f"<tool_call>\n{XML}\n</tool_call>", Type(" a")),
        (XML, Type(" a")),
    ],
)  # fmt: skip
def test_slips_that_published_clients_forgive(text: str, action: object) -> None:
    assert parse(text, SAME) == action


def test_half_a_call_types_nothing() -> None:
    whole = call(action="type", text="a secret")
    for cut in range(len(whole) - len("}}\n</tool_call>")):
        assert isinstance(parse(whole[:cut], SAME), ParseError)
    assert isinstance(parse(XML[: XML.index("\n</parameter>\n</function>")], SAME), ParseError)


def test_flags() -> None:
    assert read(WAIT.removesuffix("</tool_call>"), SAME) == Reading((Wait(),), frozenset({"unclosed"}))
    outside = call(action="left_click", coordinate=[281, -1])
    assert read(outside, SAME) == Reading((Click(279, 0),), frozenset({"clamped"}))


def test_qwen3_counts_to_a_thousand() -> None:
    frame = Frame((1280, 720), (1280, 736), space=CoordinateSpace.PER_MILLE)
    assert parse(call(action="left_click", coordinate=[500, 250]), frame) == Click(640, 180)
    assert "[500, 250]" in render(Click(640, 180), frame)
    refused = parse(call(action="left_click", coordinate=[1100, 250]), frame)
    assert isinstance(refused, ParseError) and "x=1100 is outside the image of extent 1000" in refused.reason


words = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=60)
keys = st.lists(st.sampled_from(["Control", "Shift", "Alt", "Meta", "Enter", "ArrowUp", "F5", "Space", "a", '"', "\\"]))


@st.composite
def some_action(draw: st.DrawFn) -> object:
    (x, y), (to_x, to_y) = (FRAME.to_css(*draw(st.tuples(st.integers(0, 167), st.integers(0, 223)))) for _ in range(2))
    direction, pixels = draw(st.sampled_from(["up", "down", "left", "right"])), draw(st.floats(0.5, 9000))
    pointed = [kind(x, y) for kind in (Click, DoubleClick, TripleClick, RightClick, MiddleClick, Move)]
    moved = [Drag(x, y, to_x, to_y), Drag(None, None, to_x, to_y)]
    scrolled = [Scroll(x, y, direction, pixels), Scroll(None, None, direction, pixels)]
    spoken = [Type(draw(words)), Hotkey(tuple(draw(keys)[:5]) or ("a",)), Wait(draw(st.floats(0, 9)))]
    done = [Finished(draw(words)), Finished(status="failure"), Click()]
    return draw(st.sampled_from([*pointed, *moved, *scrolled, *spoken, *done]))


@settings(max_examples=150, deadline=None)
@given(action=some_action(), before=st.sampled_from(["", "I click, see [1, 2] and {x}.\n"]))
def test_round_trip(action: object, before: str) -> None:
    assert parse(before + render(action, FRAME), FRAME) == action  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "action",
    [acts.LongPress(1, 2), acts.KeyDown("a"), acts.KeyUp("a"), acts.OpenApp("x"), acts.PressHome(), acts.PressBack()]
    + [acts.CallUser(), Finished("why", "failure"), Wait(float("nan")), Scroll(1, 2, "up", float("inf")), Hotkey(())],
)
def test_render_refuses_what_it_cannot_say(action: acts.Action) -> None:
    with pytest.raises(ValueError, match="the computer_use grammar cannot say"):
        render(action, FRAME)
