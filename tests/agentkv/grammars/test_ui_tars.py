"""The UI-TARS grammar: every spelling is read, what is rendered is read back, garbage is a value and never an
exception.
"""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkv.envs.actions import (
    CallUser,
    Click,
    DoubleClick,
    Drag,
    Finished,
    Goto,
    Hotkey,
    KeyDown,
    KeyUp,
    LongPress,
    MiddleClick,
    Move,
    OpenApp,
    PressBack,
    PressHome,
    RightClick,
    Scroll,
    Several,
    TripleClick,
    Type,
    Wait,
)
from agentkv.grammars.base import MAX_REPLY, Frame, ParseError, Reading
from agentkv.grammars.ui_tars import parse, parse_all, read, render

FRAME = Frame((160, 210), (168, 224))
SAME = Frame((280, 280), (280, 280))


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("Action: click(start_box='(84,112)')", Click(84, 112)),
        ("Thought: look.\nAction: click(start_box='(84, 112)')", Click(84, 112)),
        ("click(start_box='(84,112)')", Click(84, 112)),
        ('Action: click(start_box="(84,112)")', Click(84, 112)),
        ("Action: left_single(point='<point>84 112</point>')", Click(84, 112)),
        ("Action: click(start_box='<|box_start|>(84,112)<|box_end|>')", Click(84, 112)),
        ("Action: click(start_box='[80, 100, 90, 110]')", Click(85, 105)),
        ("Action: click(start_box='<bbox>80 100 90 110</bbox>')", Click(85, 105)),
        ("Action: click(start_box='(8.5,12.25)')", Click(8.5, 12.25)),
        ("Action: left_double(start_box='(1,2)')", DoubleClick(1, 2)),
        ("Action: right_single(start_box='(1,2)')", RightClick(1, 2)),
        ("Action: drag(start_box='(1,2)', end_box='(3,4)')", Drag(1, 2, 3, 4)),
        ("Action: drag( end_box = '(3,4)' , start_box = '(1,2)' )", Drag(1, 2, 3, 4)),
        ("Action: scroll(start_box='(1,2)', direction='down')", Scroll(1, 2, "down", 500)),
        ("Action: hotkey(key='ctrl c')", Hotkey(("Control", "c"))),
        ("Action: hotkey(key='ctrl+shift+Return')", Hotkey(("Control", "Shift", "Enter"))),
        ("Action: press(key='esc')", KeyDown("Escape")),
        ("Action: keydown(key='w')", KeyDown("w")),
        ("Action: release(key='ctrl')", KeyUp("Control")),
        ("Action: keyup(key='W')", KeyUp("W")),
        ("Action: hotkey(key='cmd space')", Hotkey(("Meta", "Space"))),
        (r"Action: hotkey(key='ctrl \'')", Hotkey(("Control", "'"))),
        ("Action: hover(point='<point>1 2</point>')", Move(1, 2)),
        ("Action: select(start_point='<point>1 2</point>', end_point='<point>3 4</point>')", Drag(1, 2, 3, 4)),
        ("Action: long_press(point='<point>1 2</point>')", LongPress(1, 2)),
        ("Action: open_app(app_name='Maps, 'beta'')", OpenApp("Maps, 'beta'")),
        ("Action: press_home()", PressHome()),
        ("Action: press_back()", PressBack()),
        ("Action: scroll(direction='Up')", Scroll(None, None, "up", 500)),
        ("Action: scroll(point='<point>1 2</point>', direction='left')", Scroll(1, 2, "left", 500)),
        ("Action: click(start_box='<|box_start|>(80,100,90,110)<|box_end|>')", Click(85, 105)),
        ("Reflection: wrong.\nAction_Summary: go on.\nAction: wait()", Wait(5)),
        ("Thought: all on one line. Action: wait()", Wait(5)),
        ("a thought whose start is in the prompt\n</think>\nAction: wait()", Wait(5)),
        ("Action: type(content='</think>\\nAction: wait()')", Type("</think>\nAction: wait()")),
        ("Action: type(content='f('a', b='c')')", Type("f('a', b='c')")),
        ("Action: finished(content='Failure.')", Finished(status="failure")),
        ("Action: finished(content='infeasible')", Finished(status="failure")),
        ("Action: finished(content='successful')", Finished("successful")),
        ("Action: finished(content='the word is failure')", Finished("the word is failure")),
        ("Action: wait()\n\nAction: click(bad", Wait(5)),
        ("Action: hotkey(key='+')", Hotkey(("+",))),
        (r"Action: type(content='it\'s \"so\"\n')", Type('it\'s "so"\n')),
        ("Action: type(content='it's (here)')", Type("it's (here)")),
        ("Action: type(content='f('a')')", Type("f('a')")),
        ("Action: type(content='')", Type("")),
        (r"Action: type(content='C:\dir')", Type("C:\\dir")),
        ("Action: wait()", Wait(5)),
        ("Action: finished()", Finished("")),
        ("Action: finished(content='42')<|im_end|>", Finished("42")),
        ("Action: call_user()", CallUser()),
        ("Action: wait()\n\nAction: finished(content='second')", Several((Wait(5), Finished("second")))),
        ("<think>\nAction: wait()\n</think>\nThought: no.\nAction: call_user()", CallUser()),
        ("Thought: the Action: marker inside a line is prose\nAction: wait()", Wait(5)),
    ],
)
def test_spellings(text: str, action: object) -> None:
    assert parse(text, SAME) == action


def test_error_names_the_place() -> None:
    text = "Thought: a\nAction: click(start_box='(1,2,3)')"
    result = parse(text, SAME)
    assert isinstance(result, ParseError)
    assert text[result.position :].startswith("'(1,2,3)'")


def test_overshoot_of_one_percent_moves_to_the_edge() -> None:
    assert parse("Action: click(start_box='(282,-2)')", SAME) == Click(279, 0)


points = st.tuples(st.integers(0, 167), st.integers(0, 223))
words = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=60)
keys = st.lists(
    st.sampled_from(["Control", "Shift", "Alt", "Meta", "Enter", "ArrowUp", "F5", "Space", "a", "Z", "7", "+"])
)


@st.composite
def some_action(draw: st.DrawFn) -> object:
    (x, y), (to_x, to_y) = (FRAME.to_css(*draw(points)) for _ in range(2))
    direction = draw(st.sampled_from(["up", "down", "left", "right"]))
    plain = [Click(x, y), DoubleClick(x, y), RightClick(x, y), Drag(x, y, to_x, to_y), Scroll(x, y, direction, 500.0)]
    plain += [Move(x, y), LongPress(x, y), Scroll(None, None, direction, 500.0)]
    spoken = [Type(draw(words)), Finished(draw(words)), Wait(5.0), CallUser(), Hotkey(tuple(draw(keys)[:3]) or ("a",))]
    held = draw(st.sampled_from(["Shift", "w", "'", "\\"]))
    phone = [KeyDown(held), KeyUp(held), OpenApp(draw(words)), PressHome(), PressBack(), Finished(status="failure")]
    return draw(st.sampled_from(plain + spoken + phone))


@settings(max_examples=150, deadline=None)
@given(
    action=some_action(),
    thought=st.sampled_from(["", "Thought: it's 'here', (see)\n"]),
    after=st.sampled_from([[], [Wait(5.0)], [Type("it's"), Hotkey(("Enter",))]]),
)
def test_round_trip(action: object, thought: str, after: list[object]) -> None:
    said = Several((action, *after)) if after else action  # type: ignore[arg-type]
    read_back = Reading(parse_all(thought + render(said, FRAME), FRAME))  # type: ignore[arg-type]
    assert list(read_back.actions) == [action, *after]


@pytest.mark.parametrize(
    "unit", ["'", "' ", "' )", "')", "',content", "',content=", " ", "\n", "Action:", "\\", "\\'", "("]
)
def test_time_grows_with_length_only(unit: str) -> None:
    def cost(length: int) -> float:
        text = ("Action: type(content='" + unit * length)[:MAX_REPLY]
        start = time.process_time()
        parse(text, FRAME)
        return time.process_time() - start

    short = max(min(cost(MAX_REPLY // 8 // len(unit)) for _ in range(2)), 1e-3)
    assert min(cost(MAX_REPLY // len(unit)) for _ in range(2)) < 40 * short


@pytest.mark.parametrize(
    ("text", "actions", "flags"),
    [
        ("Action: hover(point='(1,2)')\n\nclick(point='(3,4)')", [Move(1, 2), Click(3, 4)], set()),
        ("Action: wait()\n\nAction: press_back()\n<|im_end|>", [Wait(5), PressBack()], set()),
        ("Action: click(point='(281,2)')", [Click(279, 2)], {"clamped"}),
    ],
)
def test_all_calls(text: str, actions: list[object], flags: set[str]) -> None:
    assert parse_all(text, SAME) == actions
    assert read(text, SAME) == Reading(tuple(actions), frozenset(flags))  # type: ignore[arg-type]


def test_all_are_one_step() -> None:
    text = "Action: hover(point='(1,2)')\n\nclick(point='(3,4)')\n\ntype(content='a')"
    assert parse(text, SAME) == Several((Move(1, 2), Click(3, 4), Type("a")))
    assert parse("Action: hover(point='(1,2)')\n\nclick(point='(1,2)')", SAME) == Click(1, 2)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Action: wait()\n\nclick(point='(1,2,3)')", "'(1,2,3)' is not a point"),
        ("Action: wait()\n\nThought: then\nAction: press_back()", "a later action of the same answer was left out"),
    ],
)
def test_what_is_left_out_is_told(text: str, told: str) -> None:
    reading = read(text, SAME)
    assert isinstance(reading, Reading) and reading.actions == (Wait(5),) and told in reading.left_out


# one row or more for each rule of the grammar's table
SLIPS = [
    ("type(content='x', start_box='(1,2)')", Type("x")),
    ("type(content='it's', start_box='(1,2)')", Type("it's")),
    ("type(content='x', force='1')", Type("x")),
    ("type(content='f('a', b='c')')", Type("f('a', b='c')")),
    ("type(start_box='(1,2)', content='x')", Type("x")),
    ("type(content='x', key='enter')", Type("x")),
    ("type(content=\"x\", start_box='(1,2)')", Type("x")),
    ("click(start_box='(1,2)', force='1')", Click(1, 2)),
    ("click(start_box='(1,2)', button='left', clicks=1)", Click(1, 2)),
    ("wait(time=3)", Wait(3)),
    ("wait(seconds='2')", Wait(2)),
    ("press_back(times='2')", PressBack()),
    ("call_user(content='which one?')", CallUser("which one?")),
    ("scroll(start_box='(1,2)', direction='down', amount=200)", Scroll(1, 2, "down", 200)),
    ("scroll(direction='down', amount='200')", Scroll(None, None, "down", 200)),
    ("select(start_box='(1,2)')", Click(1, 2)),
    ("type(content='x') now", Type("x")),
    ("type(content='x');", Type("x")),
    ("type(content='x') then type(content='y')", Type("x")),
    ("type(content='x') hotkey(key='enter')", Several((Type("x"), Hotkey(("Enter",))))),
    ("type(content='C:\\dir\\')", Type("C:\\dir\\")),
    ("finished(content='done') # so", Finished("done")),
    ("click(start_box=(1,2))", Click(1, 2)),
    ("click(start_box=[1, 2, 3, 4])", Click(2, 3)),
    ("hotkey(key='ctrl + a')", Hotkey(("Control", "a"))),
    ("hotkey(hotkey='ctrl a')", Hotkey(("Control", "a"))),
    ("hotkey(keys='Page_Down')", Hotkey(("PageDown",))),
    ("left_click(point='(1,2)')", Click(1, 2)),
    ("mouse_move(point='(1,2)')", Move(1, 2)),
    ("navigate(content='https://a.org/')", Goto("https://a.org/")),
    ("type(content='x')\nThat's it, I said.", Type("x")),
]


@pytest.mark.parametrize(("call", "action"), SLIPS)
@pytest.mark.parametrize("mark", ["Action: ", "Thought: so\nAction: ", "Thought：so\nAction：", "so. Action: "])
def test_slips_that_published_clients_forgive(call: str, action: object, mark: str) -> None:
    assert parse(mark + call, SAME) == action


@pytest.mark.parametrize(
    "call",
    [
        "type(content='x') and ('y') so",
        "type(content='f('a')\nreturn g('b')')",
        "type(content='x'",
        "type(content='x', start_box='(1,2)",
        "type(text='x')",
    ],
)
def test_nothing_is_typed_that_may_be_no_text(call: str) -> None:
    assert isinstance(parse(f"Action: {call}", SAME), ParseError)


def test_a_value_of_select_is_not_typed() -> None:
    reading = read("Action: select(point='(1,2)', content='red')", SAME)
    assert reading == Reading((Click(1, 2),), frozenset({"ignored"}), "select's content 'red' was left out")


def test_render_refuses_what_it_cannot_say() -> None:
    with pytest.raises(ValueError, match="'BrowserBack' is not a key of this grammar"):
        render(Hotkey(("BrowserBack",)), FRAME)
    for action in (MiddleClick(1, 2), TripleClick(1, 2), Drag(None, None, 1, 2), Finished("why", "failure")):
        with pytest.raises(ValueError, match="the UI-TARS grammar cannot say"):
            render(action, FRAME)
    with pytest.raises(ValueError, match="the UI-TARS grammar cannot say Hotkey"):
        render(Hotkey(("Control", "a", "b", "c")), FRAME)
    with pytest.raises(ValueError, match="the UI-TARS grammar cannot say Click"):
        render(Click(), FRAME)
    with pytest.raises(ValueError, match="the UI-TARS grammar cannot say Finished"):
        render(Finished("infeasible"), FRAME)
    with pytest.raises(ValueError, match="is not a point; give two finite numbers"):
        render(Click(float("nan"), 1), FRAME)
