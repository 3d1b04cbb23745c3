"""Arguments: the value, the limit and the mend in one line."""

from argparse import ArgumentTypeError

import pytest

from textkv.arguments import device
from textkv.command import count, fraction, lengths, names, numbers, readable, seed


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (count, "1", 1),
        (seed, "0", 0),
        (fraction, "0.25", 0.25),
        (names, "h2o, d2o(window=8,ratio=2),", ["h2o", "d2o(window=8,ratio=2)"]),
        (lengths, "256,1024", [256, 1024]),
        (numbers, "0.1,2", [0.1, 2.0]),
        (device, "cpu", "cpu"),
    ],
)
def test_what_is_right_is_read(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "line"),
    [
        (count, "0", "0 is not a count; use 1 to 2,147,483,647"),
        (count, "1e3", "'1e3' is not a count; use a whole number from 1 on"),
        (count, "9" * 30, "is not a count"),
        (count, "nan", "'nan' is not a count"),
        (seed, "-1", "-1 is not a seed; use 0 to"),
        (fraction, "nan", "nan is not a finite number"),
        (fraction, "inf", "inf is not a finite number"),
        (fraction, "1.5", "1.5 lies outside 0 to 1; a percentage 1.5 is 0.015"),
        (fraction, "-0.1", "-0.1 lies outside 0 to 1"),
        (fraction, "", "'' is not a number"),
        (names, "", "'' names nothing"),
        (names, " , ,", "names nothing"),
        (lengths, "256,-1", "-1 is not a number of tokens"),
        (numbers, "0.1,x", "'x' is not a number"),
        (device, "gpu9", "device 'gpu9' cannot be used"),
        (readable, "", "there is no file ''"),
        (readable, "/nowhere/at/all", "there is no file '/nowhere/at/all'"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(kind, text, line):
    with pytest.raises(ArgumentTypeError) as caught:
        kind(text)
    assert line in str(caught.value) and "\n" not in str(caught.value)
