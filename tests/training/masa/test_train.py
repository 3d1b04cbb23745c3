"""Training with shared weights: it learns, goes on where it stopped, and leaves a model that every command reads."""

import pytest

from textkv import models
from textkv.models.atoms import FILE
from training.masa.train import MasaSettings, MasaTrainer

SMALL = dict(layers=2, hidden=24, heads=2, kv_heads=2, length=32, rows=4, warmup=2, device="cpu")


@pytest.mark.parametrize(
    "sharing", [{}, {"atoms": 1}, {"atoms": 1, "coefficients": "repeat"}, {"rank": 2}, {"kv_heads": 1}]
)
def test_every_method_learns_and_is_read_again(sharing, tmp_path):
    trainer = MasaTrainer(MasaSettings(**(SMALL | {"steps": 12} | sharing)), tmp_path)
    trainer.run(report=6)
    model, tokenizer = models.load(str(tmp_path / "latest"))
    assert model.config.num_hidden_layers == 2 and len(tokenizer) > 0
    assert (tmp_path / "latest" / FILE).is_file() == bool(set(sharing) & {"atoms", "rank"})


def test_a_training_goes_on_and_refuses_other_settings(tmp_path):
    first = MasaTrainer(MasaSettings(**SMALL, steps=4, atoms=1), tmp_path)
    first.run(report=2)
    again = MasaTrainer(MasaSettings(**SMALL, steps=4, atoms=1), tmp_path)
    assert again.step == 4 and again.progress == 1.0
    with pytest.raises(ValueError, match="another settings"):
        MasaTrainer(MasaSettings(**SMALL, steps=4, atoms=2), tmp_path)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(steps=0), "steps=0"),
        (dict(heads=5), "heads=5"),
        (dict(kv_heads=3, heads=4), "kv_heads=3"),
        (dict(atoms=7, layers=6), "atoms=7"),
        (dict(atoms=1, coefficients="some"), "network"),
        (dict(length=1), "length=1"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        MasaSettings(**wrong)


@pytest.mark.parametrize("asked", [{"layers": 2_000_000_000}, {"hidden": 6_000_000}, {"rows": 2_000_000_000}])
def test_a_size_beyond_memory_is_refused_before_the_work(asked: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"needs [\d,.]+ GB, and cpu has"):
        MasaSettings(device="cpu", **asked)
