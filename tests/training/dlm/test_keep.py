"""Installing weights: only better ones, with their figures beside them."""

import json

from dlm.mini import load_mini
from training.dlm import keep


def rows(accuracy):
    figures = {"n": 10, "accuracy": accuracy, "low": 0.0, "high": 1.0, "working": 0.5, "gen_length": 64, "seconds": 1.0}
    return [{"model": "llada", "task": "all", **figures}]


def test_better_weights_replace_worse_ones(trainer_of, tmp_path, monkeypatch, capsys):
    trainer = trainer_of("llada")
    trainer.save()
    latest = tmp_path / "run" / "latest"
    monkeypatch.setattr(keep, "WEIGHTS", tmp_path / "weights")
    found = iter([0.5, 0.4, 0.9])
    monkeypatch.setattr(keep, "measure", lambda *_: rows(next(found)))
    for step, expected in ((1, 0.5), (2, 0.5), (3, 0.9)):
        trainer.step = step
        trainer.save()
        keep.main([str(latest), "--n", "10"])
        place = tmp_path / "weights" / "llada"
        assert keep.recorded(place) == expected
        assert json.loads((place / "training.json").read_text())["step"] == (1 if step == 2 else step)
    assert "0.900 exact, in place 0.500" in capsys.readouterr().out
    assert "| all | 10 | 0.900 |" in (place / "README.md").read_text()
    assert load_mini(place)[0].num_parameters() == trainer.model.num_parameters()
    assert not list(tmp_path.glob("weights/*.draft"))


def test_a_folder_that_is_no_export_is_refused(tmp_path, capsys):
    assert keep.main([str(tmp_path)]) == 2
    assert "has no training.json" in capsys.readouterr().err
