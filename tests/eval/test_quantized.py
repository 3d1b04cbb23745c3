"""transformers' quantised caches beside ours: names, bytes, and the same measurements on the same model."""

from __future__ import annotations

import re

import pytest
import torch
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from agentkv.eval import quantized
from agentkv.eval.quantized import BACKENDS, HAS_FP8, ForeignCache, open_cache, parse_foreign, takes_budget, tensors_in
from agentkv.eval.textbench import held
from tests.textkv import tiny
from textkv import MethodCache, use

MISSING = {
    "hf-quanto": None if is_optimum_quanto_available() else "optimum-quanto is not installed (extra `quantized`)",
    "hf-hqq": None if is_hqq_available() else "hqq is not installed (extra `quantized`)",
}


@pytest.fixture(autouse=True)
def everything_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are read alike with and without the extra."""
    monkeypatch.setattr(quantized, "is_optimum_quanto_available", lambda: True)
    monkeypatch.setattr(quantized, "is_hqq_available", lambda: True)
    monkeypatch.setattr(quantized, "HAS_FP8", True)
    monkeypatch.setattr(quantized, "which", lambda name: f"/usr/bin/{name}")


def test_a_name_stands_for_settings_of_transformers() -> None:
    theirs = {"nbits": 4, "axis_key": 0, "axis_value": 0, "q_group_size": 64, "residual_length": 128}
    assert parse_foreign("hf-quanto(4)").settings() == parse_foreign("hf-hqq").settings() == theirs
    assert parse_foreign("hf-quanto(2, axis_key=-1)").settings() == theirs | {"nbits": 2, "axis_key": -1}
    assert parse_foreign("hf-fp8").settings() == {} and parse_foreign("hf-fp8").backend == "fp8"
    assert not takes_budget("hf-hqq(4)", "0.2") and takes_budget("snapkv", "0.2") and not takes_budget("kivi(4)", "0.2")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("hf-quanta(4)", "unknown cache of transformers 'hf-quanta'; did you mean hf-quanto"),
        ("hf-quanto(3)", "bits=3: hf-quanto stores 2, 4"),
        ("hf-hqq(4, axis_key=-1)", "axis_key=-1: hf-hqq knows 0 and 1"),
        ("hf-hqq(4, group=0)", "group=0, residual=128: both must be at least 1"),
        ("hf-fp8(8)", "its arguments are: none"),
        ("hf-hqq(bit=4)", "its arguments are: bits, axis_key"),
        ("hf-quanto(4)+snapkv", "cannot be put behind or before a method"),
    ],
)
def test_a_bad_name_is_refused(method: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_foreign(method)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "HAS_FP8", False)
    with pytest.raises(ValueError, match="hf-fp8: transformers .* has no such cache; 5.23 has"):
        parse_foreign("hf-fp8")
    monkeypatch.setattr(quantized, "is_hqq_available", lambda: False)
    with pytest.raises(ValueError, match=r"hf-hqq needs hqq, .* pip install 'agentkv\[quantized\]'"):
        takes_budget("hf-hqq(4)", "0.2")
    monkeypatch.setattr(quantized, "is_optimum_quanto_available", lambda: False)
    with pytest.raises(ValueError, match="hf-quanto needs optimum-quanto"):
        parse_foreign("hf-quanto(4)")
    monkeypatch.setattr(quantized, "is_optimum_quanto_available", lambda: True)
    monkeypatch.setattr(quantized, "which", lambda name: None)
    with pytest.raises(ValueError, match="finds no ninja"):
        parse_foreign("hf-quanto(4)")


class Wrapped(torch.Tensor):
    """A tensor that is made of others, as quanto's are."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Wrapped:
        whole = torch.Tensor._make_wrapper_subclass(cls, (8, 64), dtype=torch.float32)
        whole.codes, whole.scale = codes, scale
        return whole

    def __tensor_flatten__(self) -> tuple[list[str], dict]:
        return ["codes", "scale"], {}

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("counting bytes computes nothing")


def test_bytes_are_those_of_what_wrappers_and_containers_hold() -> None:
    codes, scale, waiting = torch.zeros(4, 64, dtype=torch.uint8), torch.zeros(8, 1), torch.zeros(1, 2, 3, 16)
    layer = {"_quantized_keys": Wrapped(codes, scale), "_quantized_values": (codes[:2], {"scale": scale, "bits": 4})}
    layer |= {"keys": waiting, "is_initialized": True, "shape": torch.Size([1])}
    found = list(tensors_in(layer))
    assert [x.nbytes for x in found] == [256, 32, 128, 32, 384]
    assert quantized.storage_bytes(found) == 256 + 32 + 384, "a storage counts once, views with all that they hold"


@pytest.mark.skipif(not HAS_FP8, reason="this transformers has no fp8 cache")
def test_their_cache_tells_what_it_holds_in_our_words() -> None:
    model = use(tiny.build("llama"))
    ids = tiny.text_ids(40, batch=2)
    cache, ours = open_cache(model, "hf-fp8", "1.0"), open_cache(model, "full", "1.0")
    assert isinstance(cache, ForeignCache) and isinstance(ours, MethodCache)
    with torch.inference_mode():
        for part in (ids[:, :32], ids[:, 32:33], ids[:, 33:34]):
            logits = [model(part, past_key_values=c).logits[:, -1] for c in (cache, ours)]
    assert cache.get_seq_length() == 34 and (logits[0] - logits[1]).norm() < 0.2 * logits[1].norm()
    one = 2 * 2 * 2 * 16  # K and V, rows, heads, head_dim
    assert cache.full_bytes() == ours.full_bytes() == 3 * 34 * one * 4
    assert cache.at_rest.kv_bytes == 3 * (32 * one + 2 * 4) and cache.at_rest.tokens_stored == 32
    assert cache.kv_bytes() == 3 * (34 * one + 2 * 4)
    assert cache.peak_bytes == cache.kv_bytes() + 34 * one * 4, "a layer's dequantised keys and values"
    figures = held(cache, 2)
    assert figures["kv_bits"] == pytest.approx(8 + 2 * 32 / (32 * one)) and figures["kv_bytes_full"] == 32 * one * 6


@pytest.mark.parametrize(("name", "bits"), [("hf-quanto", 4), ("hf-quanto", 2), ("hf-hqq", 4)])
def test_integer_backends_run_and_are_counted(name: str, bits: int) -> None:
    if MISSING[name]:
        pytest.skip(MISSING[name])
    model = use(tiny.build("llama"))
    cache = open_cache(model, f"{name}({bits})", "1.0")
    ids = tiny.text_ids(66)
    with torch.inference_mode():
        model(ids[:, :64], past_key_values=cache)
        packed = cache.kv_bytes()
        model(ids[:, 64:65], past_key_values=cache)
    numbers = 3 * 2 * 64 * 2 * 16  # layers, K and V, tokens, heads, head_dim
    assert cache.at_rest.kv_bytes == packed == numbers * bits / 8 + numbers / 64 * 2 * 4
    assert cache.kv_bytes() == packed + 3 * 2 * 2 * 16 * 4, "one token of each layer waits in full precision"
    assert cache.peak_bytes >= packed + 2 * 65 * 2 * 16 * 4


def test_every_backend_has_its_name() -> None:
    assert sorted(BACKENDS) == ["hf-fp8", "hf-hqq", "hf-quanto"]
    assert all(cls.name == name for name, cls in BACKENDS.items())
