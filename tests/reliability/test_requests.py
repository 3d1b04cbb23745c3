"""Every option of every command meets everything that cannot be right for its type: one line, exit code 2, no work.

The types are those of `textkv.command` and `textkv.arguments`; an option with any other type fails here, so that a new
one is checked too.
"""

import argparse
from pathlib import Path

import pytest

from .commands import Command, commands

REFUSED = "one line, exit 2"
EMPTY, HUGE = ("empty", ""), "9" * 40
# Python itself would read the last three.
UNREADABLE = [("hexadecimal", "0x10"), ("full-width digits", "５"), ("underscore", "1_0"), ("blanks", " 1 ")]
NO_NUMBERS = [EMPTY, ("nan", "nan"), ("no number", "x"), *UNREADABLE]
NUMBERS = [*NO_NUMBERS, ("infinite", "inf"), ("negative", "-1"), ("huge", HUGE), ("overflowing", "1e999")]
COUNTS = [*NUMBERS, ("no whole number", "1.5")]
FROM_ONE = [*COUNTS, ("zero", "0")]
LISTS = [EMPTY, ("empty list", ","), ("empty list", " , "), ("a comma too many", "1,,2")]
BUDGETS = [*NUMBERS, ("zero", "0"), ("percent", "40"), ("no tokens", "0t"), ("half a token", "12.5t")]
METHODS = [
    ("unknown name", "snapvk"), ("malformed", "snapkv("), ("unknown argument", "snapkv(x=1)"),
    ("of another type", "snapkv(window=True)"), ("of another type", "snapkv('8')"), ("half a token", "snapkv(8.5)"),
    ("overflowing", "snapkv(1e400)"), ("huge", f"snapkv({HUGE})"), ("given twice", "snapkv(8,window=8)"),
    ("given twice", "snapkv(window=8,window=9)"), ("two budgets", "snapkv(budget=0.2)"),
    ("no method of its own", "textkv.method:Method"),
]  # fmt: skip
CACHES = [
    ("unknown name", "freecash"), ("percent", "freecache+snapkv(40)"), ("nan", "freecache+snapkv(nan)"),
    ("overflowing", "freecache+snapkv(1e999)"), ("negative", "freecache+snapkv(-0.5)"),
    ("unknown argument", "freecache(x=1)"), ("malformed", "freecache("),
]  # fmt: skip
READABLE = [EMPTY, ("missing", "{nowhere}"), ("folder for a file", "{folder}")]
TEXTS = [EMPTY, ("blank", "  "), ("not UTF-8", "\udcff")]


def parts(cases: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those that are wrong in a list too, which may have blanks behind its commas."""
    return [case for case in cases if case[0] != "blanks"]


WRONG: dict[str, list[tuple[str, str]]] = {
    **dict.fromkeys(("count", "episodes", "processes"), FROM_ONE),
    "token_count": [*FROM_ONE, ("more than a text has", "2000000000")],
    "question_count": [*FROM_ONE, ("more than are made before the work", "2000000000")],
    "client_counts": [*parts(FROM_ONE), *LISTS, ("more than a machine has threads", "1,2000000000")],
    **dict.fromkeys(("natural", "seed", "threads"), COUNTS),
    "port": [*FROM_ONE, ("beyond the last port", "65536")],
    "lengths": [*parts(FROM_ONE), *LISTS, ("one of a list", "256,-1"), ("more than a text has", "2000000000")],
    "naturals": [*parts(COUNTS), *LISTS, ("one of a list", "256,-1")],
    "fraction": [*NUMBERS, ("percent", "40"), ("outside 0 to 1", "1.5"), ("outside 0 to 1", "-0.1")],
    "fractions": [*parts(NUMBERS), *LISTS, ("percent", "0.1,40")],
    **dict.fromkeys(("seconds", "positive", "scale"), [*NUMBERS, ("zero", "0")]),
    "weight": NUMBERS,
    "finite": [*NO_NUMBERS, ("infinite", "inf"), ("overflowing", "1e999")],
    "numbers": [*parts(NO_NUMBERS), *LISTS, ("one of a list", "1,inf"), ("overflowing", "1e999")],
    "size": [*NUMBERS, ("zero", "0B"), ("no unit", "512"), ("huge", f"{HUGE}GB"), ("full-width digits", "１GB")],
    "budget": BUDGETS,
    "budgets": [*parts(BUDGETS), *LISTS, ("percent", "0.2,40")],
    "method": [EMPTY, *METHODS],
    "methods": [*LISTS, *METHODS, ("unknown name", "full,snapvk")],
    "cache": [EMPTY, *CACHES],
    "entries": [*LISTS, *CACHES, ("one of a list", "dual,freecash"), ("unknown rule", "dual+treshold(0.9)")],
    "caches": [*LISTS, *CACHES, ("one of a list", "dual,freecash")],
    "unmask": [
        EMPTY, ("unknown name", "treshold(0.9)"), ("outside 0 to 1", "threshold(1.5)"),
        ("outside 0 to 1", "threshold(-0.1)"), ("percent", "threshold(90)"), ("nan", "threshold(nan)"),
        ("overflowing", "factor(1e999)"), ("unknown argument", "threshold(x=1)"),
    ],
    "names": LISTS,
    "choices": [*LISTS, ("unknown name", "neither")],
    "some_text": TEXTS,
    "question": [*TEXTS, ("no word", "?!")],
    **dict.fromkeys(("check_task", "find"), [EMPTY, ("unknown name", "neither")]),
    "numbers_of": [
        *LISTS, ("full-width digits", "５"), ("ends before it begins", "1,5..3"), ("zero", "0"), ("negative", "-1"),
        ("no number", "x"), ("huge", f"1..{HUGE}"),
    ],
    "pixels": [*COUNTS, ("zero", "0x720"), ("one number", "1280")],
    "sizes_of": [*NUMBERS, *LISTS, ("zero", "0B"), ("no unit", "512"), ("one of a list", "8GB,nan")],
    "rates": [*COUNTS, *LISTS, ("too few", "4000,50"), ("zero", "0,50,1GB"), ("nan", "nan,50,1GB")],
    "device": [("unknown device", "toaster"), ("computes nothing", "meta"), ("device that is not there", "cuda:77")],
    "readable": READABLE,
    **dict.fromkeys(("text_file", "_prompt"), [*READABLE, ("not UTF-8", "{binary}")]),
    "readable_folder": [EMPTY, ("missing", "{nowhere}"), ("file for a folder", "{file}")],
    **dict.fromkeys(("existing_path", "trained_folder"), [EMPTY, ("missing", "{nowhere}")]),
    "cluster": [*TEXTS, ("no port", "somewhere"), ("no port", "host:"), ("beyond the last port", "host:65536")],
    "template": [
        EMPTY, ("missing", "{nowhere}"), ("folder for a file", "{folder}"), ("empty file", "{empty}"),
        ("stranger's file", "{file}"),
    ],
    "keys": [EMPTY, ("missing", "{nowhere}"), ("folder for a file", "{folder}"), ("empty file", "{empty}")],
}  # fmt: skip
PLACES = [("below a file", "{file}/x"), ("unwritable place", "/proc/none/x")]
FILES = [EMPTY, *PLACES, ("folder for a file", "{folder}"), ("stranger's file", "{file}"), ("device", "/dev/null")]
OUTPUTS: dict[str, list[tuple[str, str]]] = {
    **dict.fromkeys(("results_file", "output_file", "_json"), FILES),
    "output_folder": [EMPTY, *PLACES, ("file for a folder", "{file}"), ("stranger's folder", "{folder}")],
    "writable_folder": [EMPTY, *PLACES, ("file for a folder", "{file}")],
}
ALL = WRONG | OUTPUTS


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Files and folders of a stranger, by the names that stand in braces above."""
    root = tmp_path_factory.mktemp("stranger")
    (root / "folder").mkdir()
    (root / "folder" / "thesis.tex").write_text("chapter 7")
    (root / "file").write_text('{"chapters": 7}')
    (root / "empty").write_text("")
    (root / "binary").write_bytes(b"a\xff")
    return {name: str(root / name) for name in ("folder", "file", "empty", "binary", "nowhere")}


def refused(command: Command, argv: list[str], capsys) -> str:
    """The one line of a request that is refused."""
    code = command.main([*command.words, *argv])
    told = capsys.readouterr()
    assert code == 2, (argv, code, told.err)
    assert told.err.count("\n") == 1 and told.err.startswith(f"{command.name}"), (argv, told.err)
    assert "Traceback" not in told.err and not told.out, (argv, told.out)
    return told.err


def kind_of(option: argparse.Action) -> str:
    return "choices" if option.choices else getattr(option.type, "__name__", "no type at all")


def request(command: Command, option: argparse.Action, value: str, places: dict[str, str]) -> list[str]:
    """Arguments that are right but for `option`, as far as a parser reads them before it comes there."""
    if option.option_strings:
        return [f"{option.option_strings[-1]}={value}"]
    before = [x for x in command.options if not x.option_strings]
    right = {"readable_folder": places["folder"], "results_file": places["nowhere"]}
    right |= {"output_file": places["nowhere"]}
    return [*(right[kind_of(x)] for x in before[: before.index(option)]), value]


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.title)
def test_everything_that_cannot_be_right_is_refused_by_its_type(command, places, capsys, reliability):
    for option in command.options:
        name, kind = "/".join(option.option_strings) or option.metavar or option.dest, kind_of(option)
        assert kind in ALL, f"{command.title} {name}: type {kind} is none of ours that is tested here"
        for fault, value in ALL[kind]:
            said = value.format(**places)
            line = refused(command, request(command, option, said, places), capsys)
            # The parser said it: nothing was loaded, opened or written.
            assert f"argument {name}" in line or f"argument {option.dest}" in line, (fault, line)
            reliability(1 if kind in OUTPUTS and said else 7, fault, command.title, REFUSED)
    assert Path(places["file"]).read_text() == '{"chapters": 7}'
    assert [x.name for x in Path(places["folder"]).iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.title)
def test_what_no_command_knows_is_refused(command, capsys, reliability):
    assert "--neither" in refused(command, ["--neither"], capsys) or command.options
    reliability(7, "unknown option", command.title, REFUSED)
    for option in command.options:
        if option.required and option.option_strings:
            refused(command, [], capsys)
            reliability(7, "required option left out", command.title, REFUSED)
            break


def test_there_are_as_many_cases_as_were_promised():
    count = sum(len(ALL.get(kind_of(option), ())) for command in commands() for option in command.options)
    assert len(commands()) >= 40 and count >= 1_000
