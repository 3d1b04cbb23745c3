"""The OpenCUA grammar: pyautogui text becomes typed actions and back; hostile replies are in `test_corpus`."""

from __future__ import annotations

import warnings

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
    KeyDown,
    KeyUp,
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
from agentkv.grammars.opencua import parse, parse_all, read, render

FRAME = Frame((160, 210), (168, 224))
SAME = Frame((280, 280), (280, 280))


def fenced(code: str, language: str = "python") -> str:
    return f"# Step 3:\n## Thought:\nThe box.\n\n## Action:\nClick it.\n\n## Code:\n```{language}\n{code}\n```\n"


@pytest.mark.parametrize(
    ("code", "actions"),
    [
        ("pyautogui.click(x=10, y=20)", [Click(10, 20)]),
        ("pyautogui.click(10, 20.5)", [Click(10, 20.5)]),
        ("pyautogui.click(x=+10, y=20, clicks=1, interval=0.1, button='left', duration=None)", [Click(10, 20)]),
        ("pyautogui.click(10, 20, 2)", [DoubleClick(10, 20)]),
        ("pyautogui.click(x=10, y=20, clicks=3, interval=0.05, button='left')", [TripleClick(10, 20)]),
        ("pyautogui.click(10, 20, button='right')", [RightClick(10, 20)]),
        ("pyautogui.click(10, 20, 1, 0, 'middle')", [MiddleClick(10, 20)]),
        ("pyautogui.rightClick(10, 20)", [RightClick(10, 20)]),
        ("pyautogui.middleClick(x=10, y=20)", [MiddleClick(10, 20)]),
        ("pyautogui.doubleClick(10, 20)", [DoubleClick(10, 20)]),
        ("pyautogui.tripleClick(10, 20)", [TripleClick(10, 20)]),
        ("computer.triple_click(x=10, y=20)", [TripleClick(10, 20)]),
        ("computer.tripleClick(10, 20)", [TripleClick(10, 20)]),
        ("pyautogui.moveTo(10, 20, duration=1)", [Move(10, 20)]),
        ("pyautogui.dragTo(30, 40, duration=1.0, button='left')", [Drag(None, None, 30, 40)]),
        ("pyautogui.moveTo(10, 20)\npyautogui.dragTo(30, 40)", [Move(10, 20), Drag(None, None, 30, 40)]),
        ("pyautogui.moveTo(10, 20)\npyautogui.click()", [Move(10, 20), Click(10, 20)]),
        ("pyautogui.write('it\\'s\\n')", [Type("it's\n")]),
        ("pyautogui.write(message='a')", [Type("a")]),
        ("pyautogui.write(text='a', interval=0.1)", [Type("a")]),
        ("pyautogui.write(content='''a\nb''')", [Type("a\nb")]),
        ("pyautogui.write(r'C:\\new')", [Type("C:\\new")]),
        ("pyautogui.write('C:\\dir')", [Type("C:\\dir")]),
        ("pyautogui.write('import os; os.system(\"x\") # f(')", [Type('import os; os.system("x") # f(')]),
        ("pyautogui.write('确定 ' 'é')  # 文字", [Type("确定 é")]),
        ("pyautogui.press('enter')", [Hotkey(("Enter",))]),
        ("pyautogui.press(['tab', 'tab'])", [Hotkey(("Tab",)), Hotkey(("Tab",))]),
        ("pyautogui.press(key='pgdn', presses=2)", [Hotkey(("PageDown",)), Hotkey(("PageDown",))]),
        ("pyautogui.press(button='F')", [Hotkey(("F",))]),
        ("pyautogui.press('\\n')", [Hotkey(("Enter",))]),
        ("pyautogui.hotkey('ctrl', 'c')", [Hotkey(("Control", "c"))]),
        ("pyautogui.hotkey(['ctrlleft', 'c'])", [Hotkey(("Control", "c"))]),
        ("pyautogui.hotkey(keys=['control', 'c'])", [Hotkey(("Control", "c"))]),
        ("pyautogui.hotkey(key1='command', key2='c')", [Hotkey(("Meta", "c"))]),
        ("pyautogui.click()", [Click()]),
        ("pyautogui.hotkey('ctrl + a')", [Hotkey(("Control", "a"))]),
        ("pyautogui.hotkey(keys='ctrl+a')", [Hotkey(("Control", "a"))]),
        ("pyautogui.keyDown('shift')\npyautogui.keyUp('shift')", [KeyDown("Shift"), KeyUp("Shift")]),
        ("pyautogui.typewrite('a\\tb')", [Type("a\tb")]),
        ("pyautogui.sleep(2)\ncomputer.wait(3)", [Wait(2), Wait(3)]),
        ("pyautogui.scroll(-5)", [Scroll(None, None, "down", 500)]),
        ("pyautogui.scroll(3, 10, 20)", [Scroll(10, 20, "up", 300)]),
        ("pyautogui.scroll(clicks=-54, x=10, y=20)", [Scroll(10, 20, "down", 5400)]),
        ("pyautogui.hscroll(2)", [Scroll(None, None, "right", 200)]),
        ("pyautogui.hscroll(-2)", [Scroll(None, None, "left", 200)]),
        ("computer.wait()", [Wait()]),
        ("import time\ntime.sleep(3)", [Wait(3)]),
        ("computer.terminate('success')", [Finished()]),
        ("computer.terminate(status='failure')", [Finished(status="failure")]),
        ("import pyautogui, time\n\n# go\npyautogui.click(1, 2); computer.wait()", [Click(1, 2), Wait()]),
    ],
)
def test_statements(code: str, actions: list[object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse_all(fenced(code), SAME) == actions
    assert parse_all(fenced(code, "code"), SAME) == actions
    assert read(fenced(code), SAME) == Reading(tuple(actions))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "action"),
    [
        ("pyautogui.moveTo(10, 20)\npyautogui.dragTo(30, 40)", Drag(10, 20, 30, 40)),
        ("pyautogui.moveTo(10, 20)\npyautogui.scroll(-1)", Scroll(10, 20, "down")),
        ("pyautogui.moveTo(10, 20)\npyautogui.doubleClick()", DoubleClick(10, 20)),
        ("pyautogui.moveTo(10, 20)\npyautogui.click(30, 40)", Several((Move(10, 20), Click(30, 40)))),
        ("pyautogui.moveTo(10, 20)\npyautogui.scroll(-1, 30, 40)", Several((Move(10, 20), Scroll(30, 40, "down")))),
        ("pyautogui.click(10, 20)\npyautogui.dragTo(30, 40)", Several((Click(10, 20), Drag(None, None, 30, 40)))),
        ("pyautogui.write('a')\npyautogui.press('enter')", Several((Type("a"), Hotkey(("Enter",))))),
        ("pyautogui.press('down', presses=3)", Several((Hotkey(("ArrowDown",)),) * 3)),
    ],
)
def test_all_are_one_step(code: str, action: object) -> None:
    assert parse(fenced(code), SAME) == action


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        (
            fenced("pyautogui.click(1, 2)") + fenced("computer.wait()"),
            Reading((Wait(),), left_out="an earlier block of code was left out: the last one counts"),
        ),
        (fenced("  computer.wait()\n    pyautogui.press('a')"), Reading((Wait(), Hotkey(("a",))))),
        ("```\ncomputer.wait()\n```", Reading((Wait(),))),
        ("```computer.wait()```", Reading((Wait(),))),
        ("```python\ncomputer.wait()\n", Reading((Wait(),), frozenset({"unclosed"}))),
        ("I wait's:\ncomputer.wait()\nor (not", Reading((Wait(),))),
        ("<think>```python\ncomputer.wait()\n```</think>" + fenced("pyautogui.press('a')"), Reading((Hotkey(("a",)),))),
        (fenced("pyautogui.write('</think>')"), Reading((Type("</think>"),))),
        (
            fenced("computer.wait()\npyautogui.click(1,"),
            Reading(
                (Wait(),),
                frozenset({"cut short"}),
                "what follows the first 1 was left out: the code is not Python: '(' was never closed",
            ),
        ),
        (fenced("computer.wait()\r\npyautogui.press('a')"), Reading((Wait(), Hotkey(("a",))))),
        (
            fenced("  computer.wait()\n  # so\n  it is"),
            Reading(
                (Wait(),),
                frozenset({"cut short"}),
                "what follows the first 1 was left out: the code is not Python: unexpected indent",
            ),
        ),
        (fenced("pyautogui.click(281, 2)"), Reading((Click(279, 2),), frozenset({"clamped"}))),
    ],
)
def test_blocks(text: str, reading: Reading) -> None:
    assert read(text, SAME) == reading


def test_further_arguments_are_passed_over() -> None:
    text = fenced("pyautogui.write('x', start_box='(1,2)')\npyautogui.click(1, 2, tween=None, _pause=False)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(text, SAME) == Reading((Type("x"), Click(1, 2)), frozenset({"ignored"}))


def test_a_bad_statement_rejects_the_lines_before_it() -> None:
    text = fenced("pyautogui.write('é'); pyautogui.click(1, 2)\nos.system('id')\nx = (")
    refused = parse(text, SAME)
    assert isinstance(refused, ParseError) and "'os' is not one of" in refused.reason
    assert text[refused.position :].startswith("os.system")
    same_line = fenced("pyautogui.write('é'); pyautogui.click(1, z)")
    refused = parse(same_line, SAME)
    assert isinstance(refused, ParseError) and same_line[refused.position :].startswith("z)")


def test_shares_of_the_sides() -> None:
    half = fenced("pyautogui.click(x=0.5, y=0.25)")
    assert read(half, FRAME) == Reading((Click(80, 52.5),), frozenset({"share"}))
    assert read(half, Frame((160, 210), (168, 224), space=CoordinateSpace.SHARE)) == Reading((Click(80, 52.5),))
    assert parse(fenced("pyautogui.click(1, 1)"), SAME) == Click(1, 1)
    assert parse(fenced("pyautogui.click(0.5, 2.0)"), SAME) == Click(0.5, 2)
    refused = parse(fenced("pyautogui.click(84, 112)"), Frame((160, 210), (168, 224), space=CoordinateSpace.SHARE))
    assert isinstance(refused, ParseError) and "x=84 is outside the image of extent 1" in refused.reason


words = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=60) | st.just(
    "a```b\n'\"\\"
)
keys = st.lists(st.sampled_from(["Control", "Shift", "Alt", "Meta", "Enter", "ArrowUp", "F5", "Space", "a", "'", "\\"]))


@st.composite
def some_action(draw: st.DrawFn) -> object:
    (x, y), (to_x, to_y) = (FRAME.to_css(*draw(st.tuples(st.integers(0, 167), st.integers(0, 223)))) for _ in range(2))
    direction, pixels = draw(st.sampled_from(["up", "down", "left", "right"])), 100.0 * draw(st.integers(1, 100))
    pointed = [kind(x, y) for kind in (Click, DoubleClick, TripleClick, RightClick, MiddleClick, Move)]
    moved = [Drag(x, y, to_x, to_y), Drag(None, None, to_x, to_y)]
    scrolled = [Scroll(x, y, direction, pixels), Scroll(None, None, direction, pixels), Click(), KeyDown("Shift")]
    spoken = [
        Type(draw(words)),
        KeyUp("a"),
        Hotkey(tuple(draw(keys)[:5]) or ("a",)),
        Wait(),
        Wait(draw(st.floats(0, 9))),
    ]
    return draw(st.sampled_from([*pointed, *moved, *scrolled, *spoken, Finished(), Finished(status="failure")]))


@settings(max_examples=150, deadline=None)
@given(action=some_action())
def test_round_trip(action: object) -> None:
    assert parse("## Action:\nDo it.\n\n" + render(action, FRAME), FRAME) == action  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "action",
    [acts.LongPress(1, 2), acts.Note("a"), acts.OpenApp("x"), acts.PressHome(), acts.PressBack()]
    + [acts.CallUser(), Finished("42"), Wait(float("nan")), Scroll(1, 2, "up", float("inf")), Hotkey(())],
)
def test_render_refuses_what_it_cannot_say(action: acts.Action) -> None:
    with pytest.raises(ValueError, match="the OpenCUA grammar cannot say"):
        render(action, FRAME)


def test_the_least_scroll_is_one_click() -> None:
    assert parse(render(Scroll(None, None, "down", 3), FRAME), FRAME) == Scroll(None, None, "down", 100)
