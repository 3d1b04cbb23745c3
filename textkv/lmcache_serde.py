"""KIVI and GEAR as LMCache serdes: what vLLM or SGLang store through LMCache lies there in 2 to 8 bits a number.

    import textkv.lmcache_serde  # registers "kivi" and "gear"
    "serde": {"type": "kivi", "bits": 4, "head_dim": 128}  # in the configuration of an L2 adapter

Chunks keep their number of tokens there, so these are codecs: no token is dropped. A chunk is a tensor
[2, layers, tokens, kv_heads * head_dim], keys first. Its tokens are packed in blocks of `group`; what the last block
lacks is filled with the last token. The tensors of all blocks follow one another in the buffer, each at a multiple of
16 bytes; their shapes follow from the chunk's, so no header is needed. Needs lmcache (0.5), which we do not install:
it pins other versions than ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.serde import AsyncSerdeProcessor, Deserializer, Serializer, register_serde_factory
from lmcache.v1.memory_management import MemoryObj

from textkv.kernels.pack import Packed, unpack
from textkv.method import resolve_method
from textkv.packing import Packer

ALIGNED = 16  # bytes, so that every tensor can be viewed in its own type
Shapes = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


@dataclass
class Codec:
    """Chunks of one form to bytes and back.

    Args:
        packer: kivi or gear.
        head_dim: of a KV head.

    Raises:
        ValueError: a head_dim below 1.
    """

    packer: Packer
    head_dim: int
    _forms: dict[tuple[int, ...], Shapes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.head_dim < 1:
            raise ValueError(f"head_dim={self.head_dim}: give the model's, e.g. 128")

    def encode(self, chunk: torch.Tensor) -> tuple[Packed, Packed]:
        """Keys and values of a chunk [2, layers, tokens, kv_heads * head_dim], packed."""
        if chunk.dim() != 4 or chunk.shape[0] != 2 or chunk.shape[3] % self.head_dim:
            raise ValueError(
                f"a chunk of shape {tuple(chunk.shape)} is not [2, layers, tokens, kv_heads * {self.head_dim}]"
            )
        heads, short = chunk.shape[3] // self.head_dim, -chunk.shape[2] % self.packer.group
        x = chunk.float()
        x = torch.cat([x, x[:, :, -1:].expand(-1, -1, short, -1)], 2) if short else x
        # [2, layers * heads, tokens, head_dim]: a run is a head of a layer
        keys, values = x.unflatten(3, (heads, -1)).transpose(2, 3).flatten(1, 2)
        counts = torch.full((len(keys),), keys.shape[1])
        return self.packer.encode(keys, values, counts, True, heads)

    def decode(self, packed: tuple[Packed, Packed], out: torch.Tensor) -> None:
        """Writes into a chunk what was packed."""
        layers, tokens, heads = out.shape[1], out.shape[2], out.shape[3] // self.head_dim
        for half, part in zip(out, packed, strict=True):
            x = unpack(part).view(layers, heads, -1, self.head_dim)[:, :, :tokens]
            half.copy_(x.transpose(1, 2).flatten(2))

    def forms(self, shape: tuple[int, ...]) -> Shapes:
        """The tensors, by name, into which a chunk of this shape is packed; they hold anything."""
        if shape not in self._forms:
            # Distinct numbers: of equal ones the largest and the smallest would be the same entries.
            some = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            self._forms[shape] = tuple(part.tensors() for part in self.encode(some))
        return self._forms[shape]

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of a packed chunk."""
        return sum(_aligned(x.nbytes) for held in self.forms(shape) for x in held.values())

    def write(self, chunk: torch.Tensor, buffer: torch.Tensor) -> int:
        """Packs a chunk into uint8 [bytes]; how many were written.

        Raises:
            ValueError: NaN, inf or numbers beyond float16, or entries that tie for an extreme place.
        """
        at = 0
        for part, form in zip(self.encode(chunk), self.forms(tuple(chunk.shape)), strict=True):
            for name, x in part.tensors().items():
                if x.shape != form[name].shape:
                    raise ValueError(
                        f"{name} has shape {tuple(x.shape)} and not {tuple(form[name].shape)}: equal numbers"
                    )
                buffer[at : at + x.nbytes] = x.contiguous().view(-1).view(torch.uint8)
                at += _aligned(x.nbytes)
        return at

    def read(self, buffer: torch.Tensor, out: torch.Tensor) -> None:
        """Unpacks uint8 [bytes] into a chunk."""
        at, parts = 0, []
        for form in self.forms(tuple(out.shape)):
            held = {}
            for name, x in form.items():
                # A copy: a view in another type would want an aligned beginning, which is the buffer's to choose.
                held[name] = buffer[at : at + x.nbytes].clone().view(x.dtype).view(x.shape)
                at += _aligned(x.nbytes)
            parts.append(Packed.from_tensors(held, self.packer.bits))
        self.decode(tuple(parts), out)


class PackedSerializer(Serializer):
    """Packs chunks; see the module."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> int:
        """Bytes written into `dst`."""
        return self.codec.write(src.tensor, dst.tensor.view(torch.uint8).flatten())

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        """Exactly what `serialize` will write."""
        return sum(self.codec.size(tuple(shape)) for shape in layout_desc.shapes)


class PackedDeserializer(Deserializer):
    """Unpacks what `PackedSerializer` wrote."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def deserialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> None:
        """Fills `dst`."""
        self.codec.read(src.tensor.view(torch.uint8).flatten(), dst.tensor)


def processor_of(method: str, told: dict[str, Any]) -> AsyncSerdeProcessor:
    """The processor that a configuration asks for: `head_dim`, `max_workers`, and the method's own arguments.

    Raises:
        ValueError: no head_dim, or an argument that the method does not take.
    """
    told = dict(told)
    if "head_dim" not in told:
        raise ValueError(f'serde {method}: say "head_dim", the width of the model\'s KV heads, e.g. 128')
    codec_of, workers = int(told.pop("head_dim")), int(told.pop("max_workers", 1))
    given = ", ".join(f"{name}={value!r}" for name, value in told.items())
    packer = resolve_method(f"{method}({given})" if given else method)
    codec = Codec(packer, codec_of)
    return AsyncSerdeProcessor(PackedSerializer(codec), PackedDeserializer(codec), max_workers=workers)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


for _name in ("kivi", "gear"):
    register_serde_factory(_name, lambda told, _name=_name: processor_of(_name, told))
