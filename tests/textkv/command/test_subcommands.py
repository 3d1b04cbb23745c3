"""Commands with commands below them refuse in one line too."""

import argparse

import pytest

from textkv.command import count, run


@pytest.mark.parametrize(
    "line", [["make", "--n", "0"], ["make", "--m", "1"], ["make"], ["mkae"], [], ["make", "deep", "--k", "x"]]
)
def test_a_wrong_request_below_is_one_line(line, capsys):
    parser = argparse.ArgumentParser()
    below = parser.add_subparsers(required=True, dest="command")
    make = below.add_parser("make")
    make.add_argument("--n", type=count)
    deep = make.add_subparsers(required=True, dest="deeper").add_parser("deep")
    deep.add_argument("--k", type=count)
    assert run("it", parser, lambda args, argv: None, line) == 2
    told = capsys.readouterr().err
    assert told.startswith("it: ") and told.count("\n") == 1
