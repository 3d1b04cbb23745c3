"""What a step of diffusion decoding costs outside the model: counted between the forwards, and one is not enough."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import AutoConfig

from agentkv.eval import dlm_speed, speed
from dlm.decode import decode

COMMAND = ["dlm", "--models", "mini", "--length", "8", "--gen-length", "8", "--steps", "4", "--rounds", "1"]


def test_a_row_for_each_cache_counts_the_steps_between_forwards(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert speed.main([*COMMAND, "--caches", "none,dual", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["model"], row["method"], row["n"]) for row in rows] == [("mini", "none", 4), ("mini", "dual", 4)]
    for row in rows:
        # The loop, the rule and the cache are a small part of what a model of a few layers calls.
        assert 0 < row["calls"] < row["calls_forward"]
        assert row["overhead"] == row["seconds_outside"] / row["seconds_forward"] > 0
    assert "calls outside" in capsys.readouterr().out


def test_the_model_is_left_as_it_was():
    model = dlm_speed.shaped("mini", None, "cpu")
    watch = dlm_speed.Watch(model)
    with watch.watching():
        decode(model, torch.tensor([[5, 6]]), gen_length=3, eos="none", cache="none")
    assert len(watch.inside) == 3 and len(watch.outside) == 2 and "forward" not in vars(model)


@pytest.mark.parametrize("option", ["--gen-length", "--steps"])
def test_one_forward_has_nothing_between(option, capsys):
    assert speed.main([*COMMAND, option, "1"]) == 2
    assert f"{option} 1: what is between two forwards is measured; use 2 or more" in capsys.readouterr().err


MODELING = """
from dataclasses import dataclass

from transformers import AutoConfig, AutoModel

from dlm.models import LLaDAModelLM as Ours
from dlm.models import LLaDAConfig as Config
from .configuration_llada import NAME


class LLaDAConfig(Config):
    def __init__(self, **given):
        super().__init__(**given)


@dataclass
class Shape:
    config: object
    init_device: str | None = None


def create_model_config_from_pretrained_config(config):
    return Shape(config)


class LLaDAModel(Ours):
    def __init__(self, shape, init_params):
        assert shape.init_device == "meta" and not init_params
        super().__init__(shape.config)


class LLaDAModelLM(Ours):
    def __init__(self, config, model):
        super().__init__(config)
        self.model = model.model


AutoConfig.register(NAME, LLaDAConfig)
AutoModel.register(LLaDAConfig, LLaDAModelLM)
"""
GENERATE = """
from model.modeling_llada import LLaDAModelLM
from dlm.decode import decode
import torch
from transformers import AutoConfig


def generate_with_dual_cache(model, prompt, steps, gen_length, block_length, mask_id):
    lengths = {"gen_length": gen_length, "block_length": block_length, "steps": steps}
    done = decode(model, prompt, **lengths, cache="dual", eos="none")
    return torch.cat([prompt, done.ids], 1), done.stats.forwards
"""


@pytest.fixture
def checkout(tmp_path):
    """Files with the names of the authors' repository, which do with our classes what theirs do."""
    folder = tmp_path / "checkout" / "v1" / "llada"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "configuration_llada.py").write_text('NAME = "llada"\n')
    (folder / "model" / "modeling_llada.py").write_text(MODELING)
    (folder / "generate.py").write_text(GENERATE)
    return tmp_path / "checkout"


def test_a_checkout_of_fast_dllm_stands_beside_ours(checkout, tmp_path):
    before, path = AutoConfig.for_model("llada").__class__, tmp_path / "rows.json"
    command = [*COMMAND, "--caches", "dual,freecache", "--fast-dllm", str(checkout), "--json", str(path)]
    assert speed.main(command) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["method"], row["library"]) for row in rows] == [
        ("dual", "ours"), ("freecache", "ours"), ("dual", "Fast-dLLM"),
    ]  # fmt: skip
    ours, alone, theirs = rows
    assert ours["equal_tokens"] == 1.0 and ours["forward_ratio"] > 0 and ours["step_ratio"] > 0
    assert all("forward_ratio" not in row for row in (alone, theirs))
    assert all(row["seconds_step"] >= row["seconds_forward"] for row in rows[:2])
    # What the checkout says of itself stays its own business.
    assert AutoConfig.for_model("llada").__class__ is before
    assert "model" not in sys.modules and not list(checkout.rglob("__pycache__"))


def test_what_is_no_checkout_is_refused_before_any_work(checkout, tmp_path, capsys):
    assert speed.main([*COMMAND, "--fast-dllm", str(tmp_path)]) == 2
    assert f"{tmp_path} is no checkout of Fast-dLLM: it has no llada or v1/llada with generate.py" in (
        capsys.readouterr().err
    )
    (checkout / "v1" / "llada" / "generate.py").write_text("import no_such_package\n")
    assert speed.main([*COMMAND, "--fast-dllm", str(checkout)]) == 2
    assert "does not run with the packages installed here: No module named 'no_such_package'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--gen-length", "40"], "40 is no multiple of 32, as Fast-dLLM needs it with blocks of 32; use 64"),
        (["--gen-length", "64", "--steps", "5"], "--steps 5 is no multiple of 2, as Fast-dLLM needs it"),
        (["--caches", "freecache"], "--caches freecache: Fast-dLLM has none, prefix, dual; name one of them"),
    ],
)
def test_what_the_authors_code_does_not_have_is_refused(checkout, capsys, options, told):
    assert speed.main([*COMMAND, *options, "--fast-dllm", str(checkout)]) == 2
    assert told in capsys.readouterr().err
