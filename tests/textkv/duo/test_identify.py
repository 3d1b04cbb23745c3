"""The command: a pattern beside the model, from both ways and both tasks, that the method reads; clear refusals."""

import copy
import json

import pytest
import torch

from tests.textkv import tiny
from textkv import MethodCache
from textkv.duo import identify
from textkv.mini.filler import sentences
from training.text.tokenizer import build_tokenizer

QUICK = ["--steps", "3", "--sinks", "2", "--recent", "8", "--passkeys", "2", "--words", "2", "--shortest", "50",
         "--longest", "250", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer(" " + " ".join(words) for words in sentences(300, seed=0))
    torch.manual_seed(0)
    config = tiny.LlamaConfig(**{**tiny.TEXT, "vocab_size": len(tokenizer), "num_hidden_layers": 2})
    tiny.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_pattern_lies_beside_the_model_and_is_used(folder, capsys):
    identify.main(["identify", "--model", str(folder), *QUICK])
    saved = json.loads((folder / "duo_attention.json").read_text())
    assert saved["how"] == "distillation" and saved["settings"]["steps"] == 3 and saved["sinks"] == 2
    assert "gates of (2, 2) (layers, KV heads): mean" in capsys.readouterr().out
    model, _ = identify.load_model(str(folder), torch.float32, "cpu")
    cache = MethodCache(model, f"duo_attention(pattern={str(folder)!r},sparsity=0.5)")
    model.generate(torch.ones(1, 20, dtype=torch.int64), past_key_values=cache, max_new_tokens=2)
    assert len(cache.layers[0].segments) == 1


@pytest.mark.parametrize("options", [["--how", "mean_qk"], ["--task", "recall", "--shortest", "128"]])
def test_the_other_ways(folder, tmp_path, options):
    out = tmp_path / "p.json"
    identify.main(["identify", "--model", str(folder), *QUICK, *options, "--out", str(out)])
    saved = json.loads(out.read_text())
    assert saved["how"] == ("mean_qk" if "mean_qk" in options else "distillation")
    assert all(0 <= g <= 1 for row in saved["gates"] for g in row)


def test_the_same_seed_gives_the_same_gates(folder, tmp_path):
    gates = []
    for n in range(2):
        identify.main(["identify", "--model", str(folder), *QUICK, "--out", str(tmp_path / f"{n}.json")])
        gates.append(json.loads((tmp_path / f"{n}.json").read_text())["gates"])
    assert gates[0] == gates[1]


def test_a_vision_language_model_is_read(tmp_path):
    tokenizer = build_tokenizer(" " + " ".join(words) for words in sentences(50, seed=0))
    wide = copy.deepcopy(tiny.build("qwen2_5_vl"))
    wide.resize_token_embeddings(len(tokenizer))
    wide.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = identify.load_model(str(tmp_path), torch.float32, "cpu")
    settings = identify.GateTraining(steps=2, sinks=2, recent=4)
    tail = torch.arange(30).numpy() >= 20
    sample = identify.Sample(tiny.text_ids(30)[0].numpy(), tail, tail)
    pattern = identify.identify(model, lambda step: sample, "distillation", settings)
    assert pattern.gates.shape == (3, 2) and model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "argument --steps: 0 is not a count"),
        (["--passkeys", "10", "--words", "32"], "longest=250 leaves no room for a haystack"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--task", "recall"], "shortest=50: rows of recall tasks have at least 96 tokens"),
    ],
)
def test_refusals_end_the_command(folder, capsys, options, message):
    assert identify.main(["identify", "--model", str(folder), *QUICK, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_model_ends_the_command(tmp_path, capsys):
    assert identify.main(["identify", "--model", str(tmp_path), *QUICK]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "duo_attention.json").exists()
