"""Published checkpoints load key by key without remote code and save under the same names; misfits are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForMaskedLM

from dlm.models import DreamConfig, LLaDAConfig, load_model
from dlm.models.loading import MODELS, register
from tests.dlm.models import slow
from tests.dlm.models.checkpoints import CONFIGS, DREAM, LLADA, published, random_state, shapes, write
from tests.dlm.models.test_networks import FAMILIES, GRAPHS


def saved_names(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            found |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    return found


@FAMILIES
@pytest.mark.parametrize("shards", [1, 3])
def test_a_published_checkpoint_loads_and_computes(tmp_path: Path, family: str, shards: int) -> None:
    state = random_state(CONFIGS[family])
    model, tokenizer = load_model(write(tmp_path, CONFIGS[family], state, shards))
    assert tokenizer is None and not model.training and model.config._attn_implementation == "dlm"
    assert type(model).__name__ == CONFIGS[family]["architectures"][0]
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == shapes(CONFIGS[family])
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    expected = slow.logits(state, GRAPHS[family], [3, 1, 60, 60])
    with torch.no_grad():
        got = model(torch.tensor([[3, 1, 60, 60]])).logits[0]
    assert (got.double() - expected).abs().max() < 2e-5 * expected.abs().max()


@FAMILIES
def test_saving_keeps_the_official_names_and_fields(tmp_path: Path, family: str) -> None:
    model, _ = load_model(published(tmp_path / "in", family))
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert saved_names(tmp_path / "out") == shapes(CONFIGS[family])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # the dtype moved to another field in transformers 5; a null field need not be written
    official = {k: v for k, v in CONFIGS[family].items() if k not in ("torch_dtype", "transformers_version")}
    assert {k: config.get(k) for k in official} == official
    again, _ = load_model(tmp_path / "out")
    ids = torch.tensor([[1, 2, 60]])
    assert torch.equal(again(ids).logits, model(ids).logits) and again.decoding_spec == model.decoding_spec


def test_a_new_llada_saves_the_fields_whose_defaults_differ_in_the_published_code(tmp_path: Path) -> None:
    small = {k: LLADA[k] for k in ("d_model", "n_layers", "n_heads", "mlp_hidden_size", "vocab_size", "mask_token_id")}
    model = MODELS["llada"](LLaDAConfig(**small, eos_token_id=61, pad_token_id=61))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("rope", "rope_full_precision", "layer_norm_type", "block_type", "weight_tying", "activation_type",
                 "n_kv_heads", "embedding_size", "include_bias", "alibi"):  # fmt: skip
        assert config[name] == LLADA[name], name
    load_model(tmp_path)


@pytest.mark.parametrize(
    ("family", "tensors", "parameters"), [("llada", 291, 8_015_581_184), ("Dream", 339, 7_615_616_512)]
)
def test_the_defaults_are_the_published_models(family: str, tensors: int, parameters: int) -> None:
    """Counts of the published weight files."""
    kind = MODELS[family]
    with torch.device("meta"):
        found = list(kind(kind.config_class()).parameters())
    assert (len(found), sum(p.numel() for p in found)) == (tensors, parameters)


@FAMILIES
def test_dtype_is_as_saved_unless_told(tmp_path: Path, family: str) -> None:
    config = CONFIGS[family] | {"torch_dtype": "bfloat16"}
    folder = write(tmp_path, config, random_state(config, dtype=torch.bfloat16))
    assert {p.dtype for p in load_model(folder)[0].parameters()} == {torch.bfloat16}
    exact, _ = load_model(folder, dtype=torch.float32)
    coarse, _ = load_model(folder, device=torch.device("cpu"))
    ids = torch.tensor([[1, 2, 3, 60, 60]])
    with torch.no_grad():
        a, b = exact(ids).logits, coarse(ids).logits
    assert a.dtype == torch.float32 and b.dtype == torch.bfloat16
    assert (a - b.float()).pow(2).mean().sqrt() < 0.03 * a.pow(2).mean().sqrt()


@FAMILIES
def test_a_device_map_spreads_the_layers(tmp_path: Path, family: str) -> None:
    """The second half of the model stays on the disk and is fetched layer by layer."""
    pytest.importorskip("accelerate")
    folder = published(tmp_path, family)
    here, _ = load_model(folder)
    far = {"llada": ("blocks.1", "transformer.ln_f"), "Dream": ("layers.1", "model.norm")}[family]
    leaves = {name.rsplit(".", 1)[0] for name in here.state_dict()}
    places = {name: "disk" if any(part in name for part in far) else "cpu" for name in leaves}
    spread, _ = load_model(folder, device=places)
    assert {p.device.type for p in spread.parameters()} == {"cpu", "meta"}
    ids = torch.tensor([[1, 2, 60, 60]])
    with torch.no_grad():
        assert torch.equal(spread(ids).logits, here(ids).logits)
        whole, _ = load_model(folder, device="auto")
        assert torch.equal(whole(ids).logits, here(ids).logits)


@FAMILIES
def test_auto_classes_know_the_models_and_never_run_the_folder_s_code(tmp_path: Path, family: str) -> None:
    folder = published(tmp_path, family)
    for name in ("configuration", "modeling"):
        (folder / f"{name}_{family.lower()}.py").write_text("raise RuntimeError('remote code ran')")
    ids = torch.tensor([[1, 2, 60]])
    expected = load_model(folder)[0](ids).logits
    assert type(AutoConfig.from_pretrained(folder)) is MODELS[family].config_class
    for auto in (AutoModel, AutoModelForMaskedLM):
        model = auto.from_pretrained(folder)
        assert type(model) is MODELS[family]
        assert torch.equal(model(ids).logits, expected)


def test_a_type_that_transformers_has_itself_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class TheirConfig(LLaDAConfig):
        pass

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "llada", TheirConfig)
    register()
    assert CONFIG_MAPPING["llada"] is TheirConfig and CONFIG_MAPPING["Dream"] is DreamConfig


LLADA_FAULTS = [
    ({"block_type": "sequential"}, "block_type='sequential' is not supported: this llada network has 'llama'"),
    ({"alibi": True}, "alibi=True"),
    ({"layer_norm_type": "default"}, "layer_norm_type='default'"),
    ({"weight_tying": True}, "weight_tying=True"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ({"n_kv_heads": 2}, "n_kv_heads=2 with n_heads=4"),
    ({"include_qkv_bias": True}, "include_qkv_bias=True"),
    ({"attention_layer_norm": True}, "attention_layer_norm=True"),
    ({"rope": False}, "rope=False"),
    ({"rope_full_precision": False}, "rope_full_precision=False"),
    ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters="),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling="),
    ({"scale_logits": True}, "scale_logits=True"),
    ({"input_emb_norm": True}, "input_emb_norm=True"),
    ({"residual_dropout": 0.1}, "residual_dropout=0.1"),
    ({"num_experts": 64}, "num_experts=64"),
    ({"n_heads": 6, "n_kv_heads": 6}, "d_model=32 does not make even heads with n_heads=6"),
    ({"embedding_size": 60}, "embedding_size=60 is below vocab_size=64"),
    ({"mask_token_id": None}, "no mask_token_id, without which nothing can be decoded"),
    ({"mask_token_id": 64}, "mask_token_id=64 is outside the vocabulary of 64"),
    ({"mask_token_id": 61}, "mask_id=61 is also the padding or an end"),
]
DREAM_FAULTS = [
    ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling="),
    ({"use_sliding_window": True}, "use_sliding_window=True"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported: this Dream network has 'silu'"),
    ({"num_key_value_heads": 4}, "num_key_value_heads=4 does not divide num_attention_heads=6"),
    ({"num_attention_heads": 16}, "hidden_size=48 does not make even heads with num_attention_heads=16"),
    ({"mask_token_id": None}, "no mask_token_id, without which nothing can be decoded"),
]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [("llada", *fault) for fault in LLADA_FAULTS] + [("Dream", *fault) for fault in DREAM_FAULTS],
)
def test_a_config_of_another_graph_is_named(tmp_path: Path, family: str, changes: dict[str, Any], message: str) -> None:
    config = CONFIGS[family] | changes
    if changes.get("mask_token_id", 0) is None:
        del config["mask_token_id"]
    write(tmp_path, config, random_state(CONFIGS[family]))
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        load_model(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = random_state(DREAM)
    without_bias = {name: tensor for name, tensor in state.items() if not name.endswith("k_proj.bias")}
    with pytest.raises(ValueError, match=r"missing: model.layers.0.self_attn.k_proj.bias, model.layers.1.self_attn"):
        load_model(write(tmp_path / "bias", DREAM, without_bias))
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=rf"of another shape: .*{name}"):
        load_model(write(tmp_path / "shape", DREAM, state | {name: torch.zeros(41, 48)}))
    with pytest.raises(ValueError, match="unknown: model.layers.0.self_attn.q_norm.weight"):
        load_model(write(tmp_path / "more", DREAM, state | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}))
    deep = random_state(LLADA | {"n_layers": 1})
    with pytest.raises(ValueError, match=r"missing: model.transformer.blocks.1.attn_norm.weight.* and 5 more"):
        load_model(write(tmp_path / "deep", LLADA, deep))


def test_places_without_a_model_of_ours(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no config.json; give the folder"):
        load_model(tmp_path)
    write(tmp_path / "a", LLADA | {"model_type": "llada9"}, {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="is a 'llada9' model; supported are 'llada' .* 'Dream'"):
        load_model(tmp_path / "a")
    published(tmp_path / "b", "llada").joinpath("model.safetensors").rename(tmp_path / "b" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no \*.safetensors; other weight files can run code"):
        load_model(tmp_path / "b")


def test_a_name_that_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.hub._hf_hub_offline", True, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is no folder here and cannot be had from the hub"):
        load_model("nobody/nothing")
