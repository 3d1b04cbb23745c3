"""Tiny trainings: the three models at a quarter of their width."""

import pytest

from dlm.mini import shape
from dlm.mini.train import TrainConfig, Trainer


@pytest.fixture
def trainer_of(tmp_path, monkeypatch):
    monkeypatch.setattr(shape, "WIDTH", 32)
    monkeypatch.setattr(shape, "INNER", 64)
    monkeypatch.setattr(shape, "LAYERS", {"llada": 2, "dream": 2, "guider": 1})

    def make(model, folder="run", **settings):
        small = {"tokens": 1056, "warmup": 2, "check_problems": 2, "check_steps": 10**6, "long": 0.0}
        return Trainer(TrainConfig(model=model, **{"minutes": 60.0, **small, **settings}), tmp_path / folder)

    return make
