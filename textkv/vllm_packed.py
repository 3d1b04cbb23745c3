"""A sketch of a vLLM plugin: pages that hold keys and values in 4 bits, read by an attention backend of one's own.

    [project.entry-points."vllm.general_plugins"]    # in a package of yours
    packed = "textkv.vllm_packed:register"

Then `AttentionBackendEnum.CUSTOM` is this backend. A page keeps a slot for every token and head, as an engine's pages
must, so this is a codec and evicts nothing: 2 * (head_dim / 2 + 4) bytes a slot for 4 * head_dim. In plain torch: it
shows the interfaces of vLLM 0.33, and a kernel would take the place of `forward`'s loop. Needs vllm, which we do not
install: its wheel is for GPUs and pins other versions than ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

TABLE = 4  # bytes of a vector's scale and minimum


def encode(x: torch.Tensor) -> torch.Tensor:
    """Vectors [..., head_dim] as uint8 [..., head_dim / 2 + 4]: two codes a byte, then scale and minimum in float16."""
    low, high = x.float().aminmax(dim=-1, keepdim=True)
    zero, scale = low.half(), ((high - low) / 15).half()
    codes = ((x.float() - zero.float()) / scale.float().clamp(min=1e-8)).round().clamp(0, 15).to(torch.uint8)
    table = torch.cat([scale, zero], -1).contiguous().view(torch.uint8)
    return torch.cat([codes[..., ::2] | codes[..., 1::2] << 4, table], -1)


def decode(packed: torch.Tensor) -> torch.Tensor:
    """The inverse, as float32."""
    codes, table = packed[..., :-TABLE], packed[..., -TABLE:].contiguous().view(torch.float16).float()
    both = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return both.float() * table[..., :1] + table[..., 1:]


@dataclass(frozen=True, kw_only=True)
class PackedSpec(FullAttentionSpec):
    """What a page of a layer weighs: vLLM's memory plan and its block pool follow from this."""

    @classmethod
    def of(cls, spec: FullAttentionSpec) -> PackedSpec:
        """The same layer with packed pages."""
        size = (spec.head_size + spec.head_size_v) // 2 + 2 * TABLE
        told = {name: getattr(spec, name) for name in ("block_size", "num_kv_heads", "head_size", "head_size_v")}
        return cls(**told, dtype=torch.uint8, state_content_bytes=size)


class PackedBackend(AttentionBackend):
    """What the registry is given; for the methods see vLLM's `AttentionBackend`."""

    @staticmethod
    def get_name() -> str:
        """Its name."""
        return "PACKED_4BIT"

    @staticmethod
    def get_impl_cls() -> type[PackedImpl]:
        """Who attends."""
        return PackedImpl

    @staticmethod
    def get_builder_cls() -> type[PackedBuilder]:
        """Who gathers what `forward` must know of a batch."""
        return PackedBuilder

    @classmethod
    def customize_spec(cls, spec: FullAttentionSpec) -> PackedSpec:
        """A layer's pages, packed."""
        return PackedSpec.of(spec)


class PackedBuilder(AttentionMetadataBuilder):
    """The common metadata (lengths, block table, slots of the new tokens) is all that is needed."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """The metadata of one forward."""
        return replace(common_attn_metadata)


class PackedImpl(AttentionImpl):
    """Writes the new tokens into their slots, then reads each request's pages."""

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None, *ignored: Any, **more: Any
    ) -> None:
        self.groups, self.scale = num_heads // (num_kv_heads or num_heads), scale

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *ignored: Any,
        **more: Any,
    ) -> torch.Tensor:
        """Args: query [tokens, heads, D], key and value [tokens, kv_heads, D], kv_cache uint8 [blocks, slots, kv_heads,
        bytes]."""
        told, pages = attn_metadata, kv_cache.flatten(0, 1)
        pages[told.slot_mapping] = torch.cat([encode(key), encode(value)], -1)
        starts, half = told.query_start_loc_cpu.tolist(), kv_cache.shape[-1] // 2
        for row, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
            n, block = int(told.seq_lens[row]), kv_cache.shape[1]
            own = kv_cache[told.block_table_tensor[row, : -(-n // block)].long()].flatten(0, 1)[:n]
            k, v = (decode(x).repeat_interleave(self.groups, 1).transpose(0, 1) for x in own.split(half, -1))
            q = query[start:end].float().transpose(0, 1)
            # The new tokens are the last of the n.
            seen = torch.ones(end - start, n, dtype=torch.bool, device=q.device).tril(n - (end - start))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scale)
            output[start:end] = out.transpose(0, 1).to(output.dtype)
        return output


def register() -> None:
    """The entry point. vLLM calls it in each of its processes, perhaps more than once."""
    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.PackedBackend")
    KVCacheSpecRegistry.register(PackedSpec, FullAttentionManager, FullAttentionSpec)
