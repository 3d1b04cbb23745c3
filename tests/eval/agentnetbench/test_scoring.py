"""Step scores: the distances, texts, keys, amounts and orders of the specification."""

from __future__ import annotations

from math import exp, sqrt

import pytest

from agentkv.envs.actions import Click, Drag, Hotkey, Move, Scroll, Type, Wait
from agentkv.eval.agentnetbench.atoms import Atom, as_released, atoms_of, typed
from agentkv.eval.agentnetbench.records import option_of
from agentkv.eval.agentnetbench.scoring import PROTOCOLS, edit_distance, scorable, score, text_score
from agentkv.grammars import Frame, ParseError, opencua, tool_call, ui_tars
from agentkv.models.opencua import OpenCuaAdapter
from tests.eval.agentnetbench.sample import FORM, SHELL, action

CLICK, MOVE = Atom("click", (0.5, 0.5)), Atom("moveto", (0.5, 0.5))
DOWN = Atom("scroll", amount=-6, direction=-1)
OPTIONS = {
    (one["task_id"], s["step_num"]): option_of(s["ground_truth_actions"], "meta_info" in one)
    for one in (FORM, SHELL)
    for s in one["steps"]
}


def value(truth: list[Atom], said: list[Atom], protocol: str = "v1", *others: list[Atom]) -> float:
    return score([truth, *others], said, protocol).value


@pytest.mark.parametrize(("d", "expected"), [(0.0141, 1.0), (0.02, 0.495), (0.03, 0.149), (0.05, 0.0135)])
def test_points_count_by_their_distance(d: float, expected: float) -> None:
    assert value([CLICK], [Atom("click", (0.5 + d, 0.5))]) == pytest.approx(expected, abs=6e-4)
    exact = 1.0 if d <= 0.01 * sqrt(2) else exp(-120 * (d - 0.01 * sqrt(2)))
    assert value([CLICK], [Atom("click", (0.5, 0.5 - d))]) == pytest.approx(exact, abs=1e-6)


def test_any_box_with_its_edges_counts_fully() -> None:
    truth = [Atom("click", (0.5, 0.5), boxes=((0.25, 0.25, 0.25, 0.5), (0.75, 0.75, 0.125, 0.125)))]
    for point in ((0.25, 0.25), (0.5, 0.75), (0.875, 0.875)):
        assert value(truth, [Atom("click", point)]) == 1.0
    assert value(truth, [Atom("click", (0.2, 0.2))]) < 0.01


@pytest.mark.parametrize(
    ("wanted", "said", "expected"),
    [("Ada", "  ada ", 1.0), ("", "", 1.0), ("abcde", "abcdx", 1.0), ("abcd", "abcx", 0.75 / 0.8), ("a\n", "a", 1.0),
     ("abc", "", 0.0)],
)  # fmt: skip
def test_texts_count_by_edit_distance(wanted: str, said: str, expected: float) -> None:
    assert text_score(wanted, said) == pytest.approx(expected)


def test_edit_distance() -> None:
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3 and edit_distance("ab", "ba") == 2


def test_a_write_takes_the_enter_after_it_on_either_side_and_nothing_changes() -> None:
    write, enter = Atom("write", text="a"), Atom("press", keys=("enter",))
    line = Atom("write", text="a\n")
    for protocol in ("v1", "v2"):
        for truth, said in (([write, enter], [line]), ([line], [write, enter])):
            assert [value(truth, said, protocol) for _ in range(3)] == [1.0] * 3
    assert value([write, Atom("hotkey", keys=("enter",))], [Atom("write", text="a")], "v2") == 1.0
    assert value([write], [write, Atom("hotkey", keys=("enter",))], "v2") == 0.5, "only a press, on the side predicted"


def test_order_and_missing_actions() -> None:
    truth = [MOVE, DOWN]
    assert value(truth, [DOWN]) == 0.0
    assert value(truth, [MOVE]) == 0.5
    assert value(truth, [MOVE, DOWN]) == 1.0
    half = Atom("scroll", amount=-3, direction=-1)
    assert value(truth, [MOVE, half], "v2") == 0.75 and value([DOWN], [half], "v2") == 0.5
    assert value([DOWN], [Atom("scroll", amount=6, direction=1)], "v2") == 0.0
    assert value([CLICK], [CLICK, MOVE], "v2") == 0.5 and value([CLICK], [CLICK, MOVE]) == 1.0
    done = Atom("terminate", status="success")
    assert value([done], [done, CLICK], "v2") == 0.5 and value([done], [Atom("terminate", status="failure")]) == 0.0


def test_keys() -> None:
    truth = [Atom("hotkey", keys=("ctrl", "v"))]
    back = [Atom("hotkey", keys=("v", "ctrl"))]
    assert value(truth, back) == 1.0 and value(truth, back, "v2") == 0.0
    twice, once = [Atom("press", keys=("down", "down"))], [Atom("press", keys=("down",))]
    assert value(twice, once) == 1.0 and value(twice, once, "v2") == 0.0
    assert value([Atom("press", keys=("f",))], [Atom("hotkey", keys=("f",))]) == 0.0
    (capital,) = option_of([action("press", keys=["F"])], False)
    assert capital.keys == ("f",)


def test_the_first_action_must_be_one_of_the_types_asked_for() -> None:
    assert value([CLICK], [Atom("write", text="x"), CLICK]) == 0.0
    assert score([[CLICK, MOVE]], [Atom("write")], "v1").types == {"click": 0.0, "moveto": 0.0}
    assert value([CLICK], []) == 0.0


def test_alternatives_count_where_they_are_better() -> None:
    other = [Atom("click", (0.9, 0.9))]
    said = score([[CLICK], [Atom("write", text="x")], other], other, "v1")
    assert said.value == 1.0 and said.types == {"click": 1.0}


def test_types_without_a_rule_earn_nothing() -> None:
    sideways = Atom("hscroll", amount=3, direction=1)
    assert value([sideways], [sideways]) == 0.0 and not scorable([sideways])
    assert value([MOVE, sideways], [MOVE, sideways]) == 1.0 and scorable([MOVE, sideways])
    assert value([MOVE, sideways], [MOVE]) == 0.5


def test_gui_kv_compares_first_actions() -> None:
    assert value([MOVE, DOWN], [MOVE], "gui_kv") == 1.0 and value([MOVE, DOWN], [DOWN], "gui_kv") == 0.0
    far, near = Atom("click", (0.1, 0.1)), Atom("write", text="yes")
    assert value([CLICK], [near], "gui_kv", [far], [near]) == 1.0
    assert value([CLICK], [Atom("click", (0.1, 0.1))], "gui_kv", [far]) < 1e-9, "only a score of 0 looks further"
    keys = as_released([Atom("hotkey", keys=("ctrl", "c"))])
    assert keys == [Atom("hotkey", keys=("control", "c"))]
    assert as_released([]) == [] and as_released([MOVE, DOWN]) == [DOWN] and as_released([MOVE, CLICK]) == [MOVE, CLICK]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("place", OPTIONS)
def test_doing_what_is_right_earns_all(place: tuple[str, int], protocol: str) -> None:
    option = OPTIONS[place]
    assert value(option, option, protocol) == (1.0 if scorable(option) else 0.0)
    assert scorable(option) == (place != ("shell", 5))


@pytest.mark.parametrize("place", [place for place in OPTIONS if place != ("shell", 5)])
@pytest.mark.parametrize("grammar", [opencua, tool_call, ui_tars], ids=["opencua", "tool_call", "ui_tars"])
def test_a_replay_in_a_grammars_words_earns_all(place: tuple[str, int], grammar) -> None:
    option, frame = OPTIONS[place], Frame((1212, 758), (1204, 756))
    actions = typed(option, frame.css, grammar.NAME)
    if grammar is ui_tars and option[0].type == "tripleclick":
        pytest.skip("UI-TARS has no triple click")
    text = grammar.render(actions[0], frame)
    reading = grammar.read(text, frame)
    assert not isinstance(reading, ParseError), text
    said = atoms_of(reading.actions, frame.css, grammar.NAME)
    assert value(option, said) == 1.0
    amount_unsaid = grammar is ui_tars and any(atom.type == "scroll" for atom in option)
    assert value(option, said, "v2") == (pytest.approx(0.8) if amount_unsaid else 1.0)


def test_typed_actions_become_atoms() -> None:
    size = (100, 200)
    assert atoms_of([Click(50, 50)], size) == [Atom("click", (0.5, 0.25))]
    assert atoms_of([Drag(0, 0, 100, 200)], size) == [Atom("moveto", (0, 0)), Atom("dragto", (1, 1))]
    down = Scroll(50, 100, "down", 300)
    assert atoms_of([down], size) == [MOVE, Atom("scroll", amount=-3, direction=-1)]
    assert atoms_of([down], size, "computer_use")[1].amount == -300
    assert atoms_of([down], size, "UI-TARS")[1].amount == -5
    assert atoms_of([Wait()], size) == [Atom("wait")]
    assert atoms_of([Hotkey(("Meta", "c"))], size)[0].keys == ("win", "c")
    assert atoms_of([Hotkey(("Meta", "c"))], size, mac=True)[0].keys == ("ctrl", "c")
    assert atoms_of([Hotkey(("Enter",))], size) == [Atom("press", keys=("enter",))]


def test_recorded_steps_become_typed_actions() -> None:
    size = (100, 200)
    assert typed([MOVE, DOWN], size) == [Scroll(50, 100, "down", 600)]
    assert typed([Atom("write", text="a"), Atom("press", keys=("enter",))], size) == [Type("a\n")]
    assert typed([MOVE, CLICK], size) == [Move(50, 100), Click(50, 100)]
    with pytest.raises(ValueError, match="no typed action"):
        typed([Atom("somersault")], size)
    with pytest.raises(ValueError, match="no name of ours"):
        typed([Atom("press", keys=("volumeup",))], size)


def test_a_whole_reply_in_opencuas_words_is_read_back() -> None:
    frame = Frame((100, 100), (112, 112))
    call = opencua.render(Click(50, 50), frame)
    text = OpenCuaAdapter.reply(OpenCuaAdapter.__new__(OpenCuaAdapter), "It is there.", "Click it.", call)
    assert text.startswith("## Thought:\nIt is there.\n\n## Action:\nClick it.\n\n## Code:")
    assert opencua.read(text, frame).actions == (Click(50, 50),)
