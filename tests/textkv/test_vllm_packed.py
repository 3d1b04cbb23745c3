"""The sketch of a vLLM plugin on vLLM's own interfaces; without a GPU the engine itself does not run."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm pins other versions than ours: make peers", allow_module_level=True)

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

HEADS, KV_HEADS, D, BLOCK = 4, 2, 32, 16


@pytest.fixture(scope="module")
def sketch():
    from textkv import vllm_packed

    vllm_packed.register()
    vllm_packed.register()
    return vllm_packed


@pytest.fixture(scope="module")
def spec(sketch):
    plain = FullAttentionSpec(block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=D, dtype=torch.bfloat16)
    return AttentionBackendEnum.CUSTOM.get_class().customize_spec(plain), plain


def test_the_registries_know_the_backend_and_its_pages(sketch, spec):
    packed, plain = spec
    assert AttentionBackendEnum.CUSTOM.get_class() is sketch.PackedBackend
    assert KVCacheSpecRegistry.get_manager_class(packed) is sketch.FullAttentionManager
    assert packed.page_size_bytes == BLOCK * KV_HEADS * 2 * (D // 2 + 4)
    assert plain.page_size_bytes == 3.2 * packed.page_size_bytes
    assert type(packed).merge([packed, packed]).page_size_bytes == packed.page_size_bytes


def test_codes_are_within_half_a_step(sketch):
    x = torch.randn(50, KV_HEADS, D)
    step = (x.amax(-1) - x.amin(-1)) / 15
    assert ((sketch.decode(sketch.encode(x)) - x).abs().amax(-1) <= 0.55 * step + 2e-3).all()


def test_requests_in_scattered_pages_attend_as_over_what_the_pages_hold(sketch, spec):
    torch.manual_seed(0)
    packed, _ = spec
    lengths, new = (37, 5), (3, 1)  # tokens in all, and those of this step
    tables = torch.tensor([[7, 2, 5], [3, 0, 0]])
    cache = torch.zeros(8, BLOCK, KV_HEADS, packed.state_content_size_bytes, dtype=torch.uint8)
    assert cache[0].numel() == packed.page_size_bytes
    impl = object.__new__(sketch.PackedImpl)
    impl.__init__(HEADS, D, D**-0.5, KV_HEADS)
    keys, values = ([torch.randn(n, KV_HEADS, D) for n in lengths] for _ in range(2))
    queries = [torch.randn(n, HEADS, D) for n in lengths]

    def step(first, last):
        """One forward over tokens [first, last) of each request."""
        spans = list(zip(first, last, strict=True))
        part = [torch.cat([x[a:b] for x, (a, b) in zip(of, spans, strict=True)]) for of in (queries, keys, values)]
        slots = [tables[row, t // BLOCK] * BLOCK + t % BLOCK for row, (a, b) in enumerate(spans) for t in range(a, b)]
        starts = torch.tensor([0, *(b - a for a, b in spans)]).cumsum(0)
        told = SimpleNamespace(
            slot_mapping=torch.stack(slots), query_start_loc_cpu=starts, seq_lens=torch.tensor(last),
            block_table_tensor=tables,
        )  # fmt: skip
        return impl.forward(None, *part, cache, told, torch.empty(len(slots), HEADS, D))

    before = [n - m for n, m in zip(lengths, new, strict=True)]
    step([0, 0], before)
    out = step(before, list(lengths)).split(new)
    for row, n in enumerate(lengths):
        k, v = (sketch.decode(sketch.encode(x[row])).repeat_interleave(2, 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", queries[row][before[row] :], k) * D**-0.5
        late = torch.arange(n) > torch.arange(before[row], n)[:, None]
        exact = torch.einsum("hqk,khd->qhd", scores.masked_fill(late, -torch.inf).softmax(-1), v)
        assert torch.allclose(out[row], exact, atol=1e-4)


def test_the_block_pool_deals_out_such_pages(sketch, spec):
    pool = BlockPool(num_gpu_blocks=8, enable_caching=False, hash_block_size=BLOCK)
    blocks = pool.get_new_blocks(3)
    assert len({block.block_id for block in blocks}) == 3 and pool.get_num_free_blocks() == 4
    pool.free_blocks(blocks)
    assert pool.get_num_free_blocks() == 7
