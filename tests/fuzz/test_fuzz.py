"""A few hundred inputs for each reader, and what the command once found."""

import json
import random

import pytest

from textkv import Budget

from .__main__ import READERS, fuzz, main
from .inputs import bent, mangled, spelled
from .targets import Spans, opened

COUNTS = "inputs", "accepted", "refused", "other"


@pytest.mark.parametrize("kind", READERS.values(), ids=READERS)
def test_nothing_but_the_promised_is_raised(kind, reliability):
    with opened(kind) as target:
        report = fuzz(target, 200, 7)
    assert report["raised"] == [] and report["inputs"] >= 200 and report["slowest_input"].startswith(kind.__name__)
    reliability(9, "random input", kind.__name__, "accepted, or refused as promised", report["inputs"])


def test_the_same_seed_gives_the_same_inputs():
    right = {"a": [1, {"b": "c"}], "d": None}
    for make in (lambda rng: bent(rng, right), lambda rng: spelled(rng, right), lambda rng: mangled(rng, b"abcdef")):
        first, again, other = (repr([make(random.Random(n)) for _ in range(9)]) for n in (1, 1, 2))
        assert first == again != other
    assert right == {"a": [1, {"b": "c"}], "d": None}


def test_an_unknown_reader_is_refused(capsys):
    assert main(["--only", "Trace", "--inputs", "1"]) == 2
    assert capsys.readouterr().err.startswith("tests.fuzz: there is no reader 'Trace'; use Expressions, ")


@pytest.mark.parametrize("share", [0.44444444444444444, 1 / 3, 0.1 + 0.2, 0.4, 1.0, 1e-7])
def test_a_budget_reads_itself(share):
    assert Budget.parse(str(Budget(fraction=share))) == Budget(fraction=share)


def test_figures_are_gone_on_with(tmp_path, capsys):
    path, few = tmp_path / "f.json", ["--only", "Spans", "--json", str(tmp_path / "f.json"), "--inputs"]
    assert main([*few, "30"]) == 0
    assert main([*few, "80", "--resume"]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    with opened(Spans) as target:
        whole = fuzz(target, 80, 0)
    assert [row[name] for name in COUNTS] == [whole[name] for name in COUNTS] and row["inputs"] == 80
    assert main([*few, "80", "--resume", "--seed", "1"]) == 2
    assert "is of seed 0, not 1; give another --json" in capsys.readouterr().err
