"""KIVI and GEAR behind LMCache's public factory, with its own memory objects."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lmcache", reason="lmcache pins other versions than ours: make peers")

from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey  # noqa: E402
from lmcache.v1.distributed.serde import create_serde_processor  # noqa: E402
from lmcache.v1.distributed.serde.base import SerdeConfig  # noqa: E402
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj  # noqa: E402

from textkv import lmcache_serde, resolve_method  # noqa: E402
from textkv.lmcache_serde import Codec, PackedDeserializer, PackedSerializer  # noqa: E402

KEY = ObjectKey(chunk_hash=b"hash", model_name="m", kv_rank=0)
DIM = 32


def chunk(tokens: int = 256, layers: int = 2, heads: int = 2) -> torch.Tensor:
    some = torch.Generator().manual_seed(1)
    return torch.randn(2, layers, tokens, heads * DIM, generator=some).to(torch.float16)


def memory(x: torch.Tensor, form: MemoryFormat) -> TensorMemoryObj:
    raw = x.contiguous().view(-1).view(torch.uint8).clone()
    told = MemoryObjMetadata(x.shape, x.dtype, 0, raw.numel(), 1, fmt=form, shapes=[x.shape], dtypes=[x.dtype])
    return TensorMemoryObj(raw, told, None)


def round_trip(method: str, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    codec = Codec(resolve_method(method), DIM)
    writer, reader = PackedSerializer(codec), PackedDeserializer(codec)
    size = writer.estimate_serialized_size(MemoryLayoutDesc([x.shape], [x.dtype]))
    packed = memory(torch.zeros(size, dtype=torch.uint8), MemoryFormat.BINARY)
    assert writer.serialize(memory(x, MemoryFormat.KV_2LTD), packed, KEY) == size
    back = memory(torch.zeros_like(x), MemoryFormat.KV_2LTD)
    reader.deserialize(packed, back, KEY)
    return back.tensor, size


@pytest.mark.parametrize(
    ("method", "share", "error"), [("kivi(4)", 0.32, 0.25), ("kivi(8)", 0.57, 0.02), ("kivi(2)", 0.2, 1.6)]
)
@pytest.mark.parametrize("tokens", [256, 100])
def test_a_chunk_comes_back_as_near_as_its_bits_allow(method, share, error, tokens):
    x = chunk(tokens)
    back, size = round_trip(method, x)
    assert (back.float() - x.float()).abs().max() < error
    if tokens == 256:
        assert size < share * x.nbytes


def test_gear_is_nearer_than_kivi_at_the_same_bits():
    x = chunk()
    far, near = (float((round_trip(m, x)[0].float() - x.float()).norm()) for m in ("kivi(2)", "gear(2)"))
    assert near < far


def test_the_factory_makes_them_by_name():
    assert lmcache_serde.ALIGNED
    for name in ("kivi", "gear"):
        create_serde_processor(SerdeConfig(name, {"bits": 4, "head_dim": DIM})).close()


@pytest.mark.parametrize(
    ("told", "says"), [({}, "head_dim"), ({"head_dim": 0}, "head_dim=0"), ({"head_dim": 8, "bit": 4}, "bit")]
)
def test_a_wrong_configuration_is_refused(told, says):
    with pytest.raises(ValueError, match=says):
        create_serde_processor(SerdeConfig("kivi", told))


def test_a_chunk_of_another_form_is_refused():
    with pytest.raises(ValueError, match="is not"):
        Codec(resolve_method("kivi"), DIM).encode(torch.zeros(2, 1, 64, 33))
