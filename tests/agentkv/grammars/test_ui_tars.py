"""The UI-TARS grammar: every spelling is read, what is rendered is read back, garbage is a value and never an
exception.
"""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkv.grammars.base import MAX_REPLY, Frame, ParseError
from agentkv.grammars.ui_tars import parse, render
from envs.actions import (
    CallUser,
    Click,
    DoubleClick,
    Drag,
    Finished,
    Hotkey,
    RightClick,
    Scroll,
    Type,
    Wait,
)

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
        ("Action: scroll(start_box='(1,2)', direction='down')", Scroll(1, 2, "down")),
        ("Action: hotkey(key='ctrl c')", Hotkey(("Control", "c"))),
        ("Action: hotkey(key='ctrl+shift+Return')", Hotkey(("Control", "Shift", "Enter"))),
        ("Action: press(key='esc')", Hotkey(("Escape",))),
        ("Action: hotkey(key='+')", Hotkey(("+",))),
        (r"Action: type(content='it\'s \"so\"\n')", Type('it\'s "so"\n')),
        ("Action: type(content='it's (here)')", Type("it's (here)")),
        ("Action: type(content='f('a')')", Type("f('a')")),
        ("Action: type(content='')", Type("")),
        (r"Action: type(content='C:\dir')", Type("C:\\dir")),
        ("Action: wait()", Wait()),
        ("Action: finished()", Finished("")),
        ("Action: finished(content='42')<|im_end|>", Finished("42")),
        ("Action: call_user()", CallUser()),
        ("Action: wait()\n\nAction: finished(content='second')", Wait()),
        ("<think>\nAction: wait()\n</think>\nThought: no.\nAction: call_user()", CallUser()),
        ("Thought: the Action: marker inside a line is prose\nAction: wait()", Wait()),
    ],
)
def test_spellings(text: str, action: object) -> None:
    assert parse(text, SAME) == action


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no action found"),
        ("I would click there.", "'I' is not an action"),
        ("Action: open_app(app_name='x')", "'open_app' is not an action; known are click"),
        ("Action: __import__('os')", "'__import__' is not an action"),
        ("Action: click()", "click needs start_box"),
        ("Action: click(start_box='(1,2)', start_box='(3,4)')", "'start_box' is given twice"),
        ("Action: click(start_box='(1,2)', point='(3,4)')", "click has two points"),
        ("Action: click(start_box='(1,2)', force='1')", "click has no argument 'force'"),
        ("Action: click(start_box=(1,2))", "expected a quoted value"),
        ("Action: click(start_box='(1,2)'", "does not end"),
        ("Action: click start_box='(1,2)'", "expected '(', found 's'"),
        ("Action: click", "found the end of the reply"),
        ("Action: click(start_box='(9**9**9,1)')", "is not a point"),
        ("Action: click(start_box='(nan,1)')", "is not a point"),
        ("Action: click(start_box='(inf,1)')", "is not a point"),
        ("Action: click(start_box='(1e3,1)')", "is not a point"),
        ("Action: click(start_box='(1,2,3)')", "is not a point"),
        ("Action: click(start_box='(True,2)')", "is not a point"),
        ("Action: click(start_box='(٣,٤)')", "is not a point"),
        ("Action: click(start_box='(-40,1)')", "x=-40 is outside the image of 280 pixels"),
        ("Action: click(start_box='(1,300)')", "y=300 is outside"),
        ("Action: scroll(start_box='(1,2)', direction='sideways')", "'sideways' is not one of up, down, left, right"),
        ("Action: scroll(start_box='(1,2)')", "scroll needs direction"),
        ("Action: hotkey(key='ctrl bogus')", "'bogus' is not a key"),
        ("Action: hotkey(key='a b c d e f')", "does not name 1 to 5 keys"),
        ("Action: wait(seconds='3')", "it takes no arguments"),
        ("Action: type(text='x')", "type has no argument 'text'; it takes content"),
        ("Action: wait()\0", "NUL"),
        ("x" * (MAX_REPLY + 1), "characters, more than"),
        ("Action: click(start_box='" + "(" * 10_000 + "')", "is not a point"),
    ],
)
def test_rejections(text: str, reason: str) -> None:
    result = parse(text, SAME)
    assert isinstance(result, ParseError)
    assert reason in result.reason
    assert 0 <= result.position <= len(text)


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
    plain = [Click(x, y), DoubleClick(x, y), RightClick(x, y), Drag(x, y, to_x, to_y), Scroll(x, y, direction)]
    spoken = [Type(draw(words)), Finished(draw(words)), Wait(), CallUser(), Hotkey(tuple(draw(keys)[:5]) or ("a",))]
    return draw(st.sampled_from(plain + spoken))


@settings(max_examples=300, deadline=None)
@given(
    action=some_action(),
    thought=st.sampled_from(["", "Thought: it's 'here', (see)\n"]),
    after=st.sampled_from(["", "\n\nAction: wait()"]),
)
def test_round_trip(action: object, thought: str, after: str) -> None:
    assert parse(thought + render(action, FRAME) + after, FRAME) == action


@settings(max_examples=200, deadline=None)
@given(
    css=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    resized=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_resized_pixels_survive_css(css: tuple[int, int], resized: tuple[int, int], share: tuple[float, float]) -> None:
    frame = Frame(css, resized)
    pixel = tuple(min(int(s * size), size - 1) for s, size in zip(share, resized, strict=True))
    x, y = frame.to_css(*pixel)
    assert frame.from_css(x, y) == pixel
    assert 0 <= x < css[0] and 0 <= y < css[1]


def test_garbage_never_raises_and_is_quick() -> None:
    rng = random.Random(3)
    pieces = [
        "Action:",
        "click",
        "type",
        "(",
        ")",
        "'",
        '"',
        "\\",
        ",",
        "=",
        "start_box",
        "content",
        "\n",
        " ",
        "(1,2)",
        "<think>",
        "</think>",
    ]
    start = time.process_time()
    for _ in range(20_000):
        text = "".join(
            rng.choice(pieces) if rng.random() < 0.7 else chr(rng.randrange(1, 0x3000))
            for _ in range(rng.randint(0, 25))
        )
        parse(text, FRAME)
    assert time.process_time() - start < 20


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


def test_nothing_is_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("the parser called into Python")

    for name in ("eval", "exec", "compile", "open", "__import__"):
        with monkeypatch.context() as patched:
            patched.setattr(builtins, name, fail)
            found = parse('Action: type(content=\'__import__("os").system("id")\')', FRAME)
        assert found == Type('__import__("os").system("id")')


def test_render_refuses_what_it_cannot_say() -> None:
    with pytest.raises(ValueError, match="'BrowserBack' is not a key of this grammar"):
        render(Hotkey(("BrowserBack",)), FRAME)
    with pytest.raises(ValueError, match="is not a point; give two finite numbers"):
        render(Click(float("nan"), 1), FRAME)


def test_frame_needs_sizes() -> None:
    with pytest.raises(ValueError, match="css=.* is not a size in pixels"):
        Frame((0, 210), (168, 224))
