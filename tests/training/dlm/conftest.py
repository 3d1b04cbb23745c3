"""Tiny trainings: the three models at a quarter of their width."""

import pytest

from training.dlm import shape
from training.dlm.train import DlmSettings, DlmTrainer


@pytest.fixture
def trainer_of(tmp_path, monkeypatch):
    monkeypatch.setattr(shape, "WIDTH", 32)
    monkeypatch.setattr(shape, "INNER", 64)
    monkeypatch.setattr(shape, "LAYERS", {"llada": 2, "dream": 2, "guider": 1})

    def make(model, folder="run", **settings):
        small = {"tokens": 1056, "warmup": 2, "check_problems": 2, "check_steps": 10**6, "long": 0.0}
        return DlmTrainer(
            DlmSettings(model=model, device="cpu", **{"minutes": 60.0, **small, **settings}), tmp_path / folder
        )

    return make
