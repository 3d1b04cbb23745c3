"""The table of MASA: perplexities, parameters and names are those of the models that are measured."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from eval import masa
from eval.bootstrap import resampled
from textkv import models
from training.masa.train import MasaSettings, MasaTrainer

SMALL = dict(layers=2, hidden=24, heads=2, kv_heads=2, length=32, rows=4, warmup=2, device="cpu", steps=2)


def test_losses_are_the_mean_cross_entropy_of_each_row():
    model, tokenizer = models.load("mini")
    ids = torch.randint(5, 50, (6, 20), generator=torch.Generator().manual_seed(0))
    found = masa.losses(model, ids)
    for each, alone in zip(found, ids, strict=True):
        expected = F.cross_entropy(model(alone[None, :-1]).logits[0].float(), alone[1:])
        assert each == pytest.approx(expected.item(), abs=1e-5)


def test_an_interval_of_equal_losses_has_no_width():
    assert resampled(torch.full((5,), 2.0).numpy()) == (2.0, 2.0, 2.0)


def test_a_pretrained_model_is_converted_both_ways_and_nothing_is_measured_twice(tmp_path, capsys, monkeypatch):
    out, read = tmp_path / "rows.json", []
    losses = masa.losses
    monkeypatch.setattr(masa, "losses", lambda *args: read.append(args[2]) or losses(*args))
    told = ["--model", "mini", "--rows", "2", "--length", "32", "--json", str(out), "--device", "cpu"]
    for reductions in ("0.2", "0.2,0.4"):
        assert masa.main([*told, "--reductions", reductions]) == 0
    assert read == ["full", "masa 20%", "low-rank 20%", "masa 40%", "low-rank 40%"]
    full, *rest = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in (full, *rest)] == ["full", "masa", "masa", "low-rank", "low-rank"]
    assert full["attention_share"] == full["ratio"] == full["ratio_low"] == 1.0
    for row in rest:
        assert row["attention_share"] == pytest.approx(1 - row["reduction"], abs=0.005)
        assert row["low"] <= row["perplexity"] <= row["high"] and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["perplexity"] > full["perplexity"]
        assert row["ratio"] == pytest.approx(row["perplexity"] / full["perplexity"])
    capsys.readouterr()
    assert masa.main([*told, "--reductions", "0.2", "--rows", "3"]) == 2
    assert "another board" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sharing", "method", "share"),
    [
        ({}, "full", 1.0),
        ({"kv_heads": 1}, "gqa 2/1", 0.75),  # of the full model's, though the folder's own weights are all there
        ({"atoms": 1}, "masa-qkvo S=1", 0.5),
        ({"atoms": 1, "coefficients": "repeat", "projections": "qkv"}, "repeat-qkv S=1", 0.625),
        ({"rank": 3}, "low-rank r=3", 0.25),
    ],
)
def test_a_trained_folder_is_told_by_its_settings(sharing, method, share, tmp_path):
    MasaTrainer(MasaSettings(**(SMALL | sharing)), tmp_path).run(report=2)
    args = masa.parser().parse_args(
        ["--trained", str(tmp_path / "latest"), "--rows", "2", "--length", "32", "--device", "cpu"]
    )
    (row,) = masa.trained(args)
    assert row["method"] == method and row["attention_share"] == pytest.approx(share, abs=2e-3)
    assert 1 < row["perplexity"] < math.inf


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--reductions", "1.5"], "1.5"),
        (["--length", "1"], "--length 1"),
        (["--atoms", "9"], "atoms=9"),
        (["--trained", "nowhere"], "nowhere"),
    ],
)
def test_wrong_requests_are_one_line(wrong, says, capsys):
    try:
        code = masa.main([*wrong, "--device", "cpu"])
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and says in said
