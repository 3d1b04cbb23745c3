"""Pattern files, and the choice of full heads from gates."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from textkv.duo.pattern import Pattern, full_heads


def test_a_pattern_survives_its_file(tmp_path):
    made = Pattern(torch.tensor([[0.0, 0.25, 1.0]]), 128, 256, "distillation", "toy", {"steps": 3})
    made.save(tmp_path / "duo_attention.json")
    for path in (tmp_path, tmp_path / "duo_attention.json"):
        read = Pattern.load(path)
        assert torch.equal(read.gates, made.gates) and (read.sinks, read.recent) == (128, 256)
        assert (read.how, read.model, read.settings) == ("distillation", "toy", {"steps": 3})
    saved = json.loads((tmp_path / "duo_attention.json").read_text())
    assert (saved["layers"], saved["kv_heads"]) == (1, 3)


def test_the_embedded_models_pattern_tells_its_heads_apart():
    """The answer is copied in layer 2 by the heads of the first KV head (`training.text.hints`)."""
    gates = Pattern.load("mini").gates
    assert gates.shape == (4, 2) and gates[2, 0] > 0.9 and gates.argmax() == 4
    assert (gates < 0.05).float().mean() >= 0.5


def test_smollm2_has_a_pattern_of_its_shape():
    pattern = Pattern.load("smollm2")
    assert pattern.gates.shape == (30, 3) and (pattern.how, pattern.model) == ("mean_qk", "smollm2")
    # Few heads look far back, in the middle layers and the last ones alike.
    assert float(pattern.gates.median()) < 0.2 < float(pattern.gates.max())


def test_the_summary():
    told = Pattern(torch.tensor([[0.0, 0.04], [0.6, 1.0]]), 1, 1).summary()
    assert told == pytest.approx({"mean": 0.41, "median": 0.04, "above_0.5": 0.5, "below_0.05": 0.5})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ('{"gates": [[0.5]]}', "cannot be read: it has no 'format'"),
        ('{"format": 9}', "format 9, this version reads 1"),
        ('{"format": 1, "gates": [[0.5], [0.5, 1]], "sinks": 1, "recent": 1, "how": "", "model": "", "settings": {}}',
         "cannot be read"),
        ('{"format": 1, "gates": [[2.0]], "sinks": 1, "recent": 1, "how": "", "model": "", "settings": {}}',
         "gates from 2 to 2: must lie in 0..1"),
        ('{"format": 1, "gates": [[NaN]], "sinks": 1, "recent": 1, "how": "", "model": "", "settings": {}}',
         "NaN is no number of JSON"),
        ('{"format": 1, "gates": [0.5], "sinks": 1, "recent": 1, "how": "", "model": "", "settings": {}}',
         "an entry of gates is 0.5, not list"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_told(tmp_path, content, message):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Pattern.load(tmp_path / "p.json")


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(ValueError, match="there is no duo_attention.json; make one with"):
        Pattern.load(tmp_path)


def test_the_largest_gates_are_full():
    gates = torch.tensor([[0.1, 0.9], [0.5, 0.2]])
    assert full_heads(gates, 2).tolist() == [[False, True], [True, False]]
    assert not full_heads(gates, 0).any() and full_heads(gates, 4).all()


def test_equal_gates_are_spread_by_the_seed():
    gates = torch.ones(32, 8)
    first = full_heads(gates, 128, seed=0)
    assert torch.equal(first, full_heads(gates, 128, seed=0))
    assert not torch.equal(first, full_heads(gates, 128, seed=1))
    # A rule of lower index would give the first 16 layers everything.
    assert int(first.any(1).sum()) > 28 and int(first.all(1).sum()) < 4


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=12, max_size=12), seed=st.integers(0, 5))
def test_choices_are_exact_and_nested(values, seed):
    gates = torch.tensor(values).view(3, 4)
    before = torch.zeros(3, 4, dtype=torch.bool)
    for count in range(13):
        chosen = full_heads(gates, count, seed)
        assert int(chosen.sum()) == count and bool((chosen | before).eq(chosen).all())
        assert not count or gates[chosen].min() >= gates[~chosen].max() if count < 12 else True
        before = chosen
