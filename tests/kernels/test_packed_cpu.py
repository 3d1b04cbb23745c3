"""The CPU's path over packed blocks against the reference: how it groups runs, cuts tiles and cuts queries."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kernels.helpers import TOLERANCE, mismatch, randn
from tests.kernels.test_fused import calls
from tests.kernels.test_packed_attention import cache, rotary_centre
from textkv.kernels import packed_attention
from textkv.kernels.pack import LowRank, Packed, Sparse, pack

module = importlib.import_module("textkv.kernels._packed_cpu")


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that comes from any operator but views."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.numbers = max(self.numbers, x.numel())
        return made


def differs(q, k, v, rows, **options):
    """What the CPU's path gives otherwise than the reference, "" = nothing."""
    ours, truth = (
        packed_attention(q, k, v, scale=0.2, **rows, **options, _backend=backend) for backend in ("fused", "reference")
    )
    return "\n".join(filter(None, (mismatch(x, y, 4 * TOLERANCE[x.dtype]) for x, y in zip(ours, truth, strict=True))))


@pytest.mark.parametrize("lengths", [(48, 48), (48, 48, 48, 48), (40, 40, 40, 40), (48, 16, 0, 33), (0, 0), (5, 5)])
@pytest.mark.parametrize("bits", [2, 4, 8, "fp8"])
@pytest.mark.parametrize("keys", ["channel", "token"])
@pytest.mark.parametrize("tile, scores", [(None, None), (16 * 32, 1), (3 * 16 * 32, 1 << 11), (2 * 48 * 32, 1 << 20)])
def test_grouping_of_runs_and_sizes_of_tiles(lengths, bits, keys, tile, scores, monkeypatch, dtype):
    if tile is not None:
        monkeypatch.setattr(module, "_TILE", tile)
        monkeypatch.setattr(module, "_SCORES", scores)
    k, v, rows = cache(lengths, bits=(bits, bits), keys=keys)
    assert not differs(randn(len(lengths) // 2, 4, 20, 32, dtype=dtype), k, v, rows)


@pytest.mark.parametrize("scores, tokens", [(1, 8192), (1 << 22, 16), (1, 40)])
@pytest.mark.parametrize("queries", [1, 20])
def test_corrections_centres_and_holes_by_parts(scores, tokens, queries, monkeypatch):
    monkeypatch.setattr(module, "_SCORES", scores)
    monkeypatch.setattr(module, "_TOKENS", tokens)
    for lengths in ((48, 48, 48, 48), (48, 16, 0, 33)):
        k, v, rows = cache(lengths, rank=2, single=7)
        valid = torch.rand(2, 2, 60) > 0.3
        for softcap in (None, 6.0):
            assert not differs(
                randn(2, 4, queries, 32), k, v, rows, softcap=softcap, valid=valid, **rotary_centre(lengths, 32, 9)
            )


@pytest.mark.parametrize("lengths", [(192, 192), (192, 130), (70, 192, 0, 5)])
@pytest.mark.parametrize("keys", ["channel", "token"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("queries", [1, 3, 31, 40, 300])
def test_wide_blocks_with_corrections_fitted_to_whole_runs(lengths, keys, groups, queries):
    k, v, rows = cache(lengths, T=64, keys=keys, rank=2, single=40, slack=0)
    v = pack(randn(v.blocks, 64, 32), 4, layout="token", group=32 // groups)
    v.scale[0], v.codes[0] = 0, 0  # groups that are one number, of which one entry stands out
    ends = rows["start"] + -(-rows["length"].long() // 64)
    chunk = (torch.arange(k.blocks) >= ends[:, None]).sum(0)  # the blocks of a run have the same directions
    at = torch.arange(k.blocks) * 100
    single = Sparse(torch.arange(k.blocks).int(), torch.ones(k.blocks).int(), at.short(), randn(k.blocks).half())
    k, v = (
        replace(x, lowrank=LowRank(randn(x.blocks, 64, 2).half(), randn(4, 32, 2).half(), chunk.int())) for x in (k, v)
    )
    assert not differs(randn(len(lengths) // 2, 2, queries, 32), k, replace(v, sparse=single), rows)


def test_runs_of_unequal_length_go_together():
    some, all_alike = cache((48, 40, 33, 48), slack=0), cache((48, 48, 48, 48), slack=0)
    q = randn(2, 4, 1, 32)
    counts = [
        len([x for x in calls(lambda c=c: packed_attention(q, c[0], c[1], scale=0.2, **c[2])) if x == "aten::bmm"])
        for c in (some, all_alike)
    ]
    assert counts[0] == counts[1]


def test_runs_need_not_lie_in_order_nor_apart():
    k, v, _ = cache((48, 48, 48, 48), slack=0)
    for start in ([9, 6, 3, 0], [0, 0, 0, 0], [0, 3, 9, 6], [2, 4, 6, 8]):
        rows = {"start": torch.tensor(start), "length": torch.full((4,), 48).int(), "longest": 48}
        assert not differs(randn(2, 4, 1, 32), k, v, rows)


def test_single_corrections_of_neighbouring_blocks_are_read_as_they_lie(monkeypatch):
    """An index for every entry costs more than all that is done with it; parts of several runs need none either."""

    def told(*_):
        raise AssertionError("entries were looked for one by one")

    part = importlib.import_module("textkv.kernels._packed_part")
    monkeypatch.setattr(part, "entries", told)
    monkeypatch.setattr(module, "_TOKENS", 32)  # two parts, each of which holds half of every run
    k, v, rows = cache((64, 64, 64, 64), single=7, slack=0)
    assert not differs(randn(2, 4, 1, 32), k, v, rows)


def test_blocks_that_are_a_slice_of_others():
    k, v, rows = cache((48, 48), slack=0)
    k, v = (Packed(x.codes[1:], x.scale[1:], x.zero[1:], x.bits) for x in (k, v))
    assert not differs(
        randn(1, 4, 1, 32), k, v, {"start": torch.tensor([0, 2]), "length": torch.tensor([32, 48]).int(), "longest": 48}
    )


def test_what_is_made_does_not_grow_with_the_run(monkeypatch):
    monkeypatch.setattr(module, "_TOKENS", 64)
    monkeypatch.setattr(module, "_TILE", 2 * 64 * 32)
    largest = []
    for n in (128, 640):
        k, v, rows = cache((n, n), bits=(4, 4))
        q = randn(1, 4, 1, 32)
        assert not differs(q, k, v, rows)
        with Largest() as seen:
            packed_attention(q, k, v, scale=0.2, **rows)
        largest.append(seen.numbers)
    assert largest[0] == largest[1] <= 2 * 64 * 32


@pytest.mark.parametrize("bits", [(2, 4), (4, 8), ("fp8", 4)])
@pytest.mark.parametrize("keys", ["channel", "token"])
@pytest.mark.parametrize("rank, single", [(0, 0), (2, 9)])
def test_many_queries_read_tiles_by_fused_attention(bits, keys, rank, single, monkeypatch):
    monkeypatch.setattr(module, "_TILE", 2 * 16 * 32)
    monkeypatch.setattr(module, "_MANY", 16)
    k, v, rows = cache((96, 96), bits=bits, keys=keys, rank=rank, single=single, slack=0)
    if rank:
        chunk = (torch.arange(k.blocks) >= 6).int()  # one set of directions for each run
        k, v = (replace(x, lowrank=replace(x.lowrank, chunk=chunk)) for x in (k, v))
    q, names = randn(1, 4, 24, 32), []
    assert not differs(q, k, v, rows)
    names = calls(lambda: packed_attention(q, k, v, scale=0.2, **rows))
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names and "aten::softmax" not in names
    q = q[:, :, :3]  # few queries: the codes are read as they are
    assert "aten::softmax" in calls(lambda: packed_attention(q, k, v, scale=0.2, **rows))


def test_results_do_not_share_the_memory_of_tiles():
    k, v, rows = cache((48, 48))
    q = randn(1, 4, 1, 32)
    first = packed_attention(q, k, v, scale=0.2, **rows)
    kept = [x.clone() for x in first]
    packed_attention(randn(1, 4, 1, 32), v, v, scale=0.2, **rows)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_gradients_take_the_reference():
    k, v, rows = cache((48, 48))
    out, _ = packed_attention(randn(1, 4, 1, 32).requires_grad_(), k, v, scale=0.2, **rows)
    assert out.grad_fn is not None


def test_the_number_of_operators_does_not_grow_with_runs_of_equal_length():
    q, few, many = randn(1, 4, 1, 32), cache((48, 48)), cache((48,) * 16)
    counts = [
        len(calls(lambda q=q, k=k, v=v, rows=rows: packed_attention(q, k, v, scale=0.2, **rows)))
        for q, (k, v, rows) in ((q, few), (randn(8, 4, 1, 32), many))
    ]
    assert counts[0] == counts[1] <= 120
