"""JSON is read strictly: what is wrong is one line, and nothing else than ValueError."""

from dataclasses import dataclass
from typing import Literal

import pytest

from textkv.records import DEPTH, LARGEST, build, checked, listed, parse, read, read_results


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"\xff", "not UTF-8 (byte 0)"),
        ("{", "not JSON (Expecting property name enclosed in double quotes)"),
        ("[1,\n2", "not JSON (Expecting ',' delimiter in line 2)"),
        ("", "not JSON (Expecting value)"),
        ("[NaN]", "NaN is no number of JSON"),
        ("-Infinity", "-Infinity is no number of JSON"),
        ("1e999", "1e999 is beyond a number of 64 bits"),
        ("9" * 5_000, "beyond a number of 64 bits"),
        (str(LARGEST + 1), "beyond a number of 64 bits"),
        ("[" * 100_000, f"nested deeper than {DEPTH}"),
        ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), f"nested deeper than {DEPTH}"),
    ],
)
def test_what_is_no_plain_json_is_one_line(text, line):
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert line in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 100


def test_plain_json_is_as_it_was():
    deep = "[" * DEPTH + "]" * DEPTH
    assert parse(deep) == eval(deep) and parse(str(-LARGEST)) == -LARGEST
    assert parse(b'{"a": [1, 2.5, null, true, "\\u00e9"]}') == {"a": [1, 2.5, None, True, "é"]}


def test_a_file_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1")
    with pytest.raises(ValueError, match=r"a.json: not JSON"):
        read(path)
    with pytest.raises(ValueError, match="a.json: 2 bytes, more than 1"):
        read(path, limit=1)


def test_fields_are_there_and_of_their_type():
    assert checked({"n": 1, "x": 2, "more": 3}, {"n": int, "x": float}, {"y": str})["more"] == 3
    for value, line in (
        ([1], "a list where an object belongs"),
        ({}, "it has no 'n'"),
        ({"n": True}, "n is true, not int"),
        ({"n": "1" * 99}, "not int"),
        ({"n": 1, "y": None}, "y is null, not str"),
    ):
        with pytest.raises(ValueError, match=line):
            checked(value, {"n": int}, {"y": str})
    with pytest.raises(ValueError, match="an entry of seeds is 1.5, not int"):
        listed([1, 1.5], int, "seeds")
    with pytest.raises(ValueError, match="seeds is an object, not a list"):
        listed({}, int, "seeds")


@dataclass(frozen=True)
class Plain:
    name: str
    x: float | None
    keys: tuple[str, ...] = ()
    way: Literal["up", "down"] = "up"
    right: list[bool] | None = None
    figures: dict[str, float] | None = None


def test_a_dataclass_comes_back_from_its_fields():
    value = {"name": "a", "x": 1, "keys": ["b"], "way": "down", "right": [True], "figures": {"s": 1}}
    assert build(Plain, value) == Plain("a", 1, ("b",), "down", [True], {"s": 1})
    assert build(Plain, {"name": "a", "x": None}) == Plain("a", None)


@pytest.mark.parametrize(
    "change",
    [{"name": 1}, {"x": "1"}, {"x": True}, {"keys": [1]}, {"keys": "ab"}, {"way": "left"}, {"way": 1}, {"right": [1]},
     {"figures": {"s": "1"}}, {"figures": []}, {"unknown": 1}, {"name": ["a"]}],
)  # fmt: skip
def test_a_field_of_another_type_is_refused(change):
    with pytest.raises(ValueError, match="Plain has no"):
        build(Plain, {"name": "a", "x": 1} | change)


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="Plain lacks x"):
        build(Plain, {"name": "a"})


def test_results_of_another_form_are_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"meta": {}, "rows": [[]]}')
    with pytest.raises(ValueError, match="is no file of results .*give another --json"):
        read_results(path)
