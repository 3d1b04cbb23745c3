"""Exact tokens beside packed ones in one softmax: as a merge of two attentions, whatever the packed tokens have."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from tests.kernels.helpers import TOLERANCE, mismatch, randn
from tests.kernels.test_packed_attention import cache, rotary_centre
from textkv.kernels import decode_attention, merge, packed_attention
from textkv.kernels.beside import Exact

CPU = importlib.import_module("textkv.kernels._packed_cpu")


def merged(q, k, v, rows, pairs, exact_q, scale, **options):
    """out, lse, and what the last query looked at of the last pair's tokens, one attention after the other."""
    softcap = options.get("softcap")
    parts = [packed_attention(q, k, v, scale=scale, **rows, **options, _backend="reference")]
    parts += [decode_attention(exact_q, *pair, scale=scale, softcap=softcap, _backend="reference") for pair in pairs]
    out, lse = merge([x for x, _ in parts], [x for _, x in parts], _backend="reference")
    keys = pairs[-1][0].repeat_interleave(q.shape[1] // pairs[-1][0].shape[1], 1)
    scores = (exact_q[:, :, -1:].float() * scale) @ keys.float().mT
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    return out, lse, (scores[:, :, 0] - lse[..., -1:]).exp()


@pytest.mark.parametrize("backend", [None, "reference", "triton"])
@pytest.mark.parametrize("lengths", [(48, 48), (48, 16, 0, 33), (0, 0)])
@pytest.mark.parametrize("keys", ["channel", "token"])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("tokens", [8192, 16])
def test_exact_tokens_are_in_the_same_softmax(backend, lengths, keys, corrected, tokens, monkeypatch, dtype):
    if backend == "triton" and tokens == 16:
        pytest.skip("the same")
    monkeypatch.setattr(CPU, "_TOKENS", tokens)
    k, v, rows = cache(lengths, keys=keys, rank=3 if corrected else 0, single=9 if corrected else 0)
    batch, runs = len(lengths) // 2, len(lengths)
    pairs = [(randn(batch, 2, r, 32, dtype=dtype), randn(batch, 2, r, 32, dtype=dtype)) for r in (0, 1, 7)]
    valid = torch.rand(batch, 2, rows["longest"]) > 0.3
    for queries in (1, 3):
        q, other = randn(batch, 6, queries, 32, dtype=dtype), randn(batch, 6, queries, 32, dtype=dtype)
        fixed, turned = {"centre": 3 * randn(runs, 32)}, rotary_centre(lengths, 32, 12, size=3) if max(lengths) else {}
        for options in ({}, fixed, turned, fixed | {"softcap": 3.0}, turned | {"softcap": 3.0, "valid": valid}):
            for exact_q in (q, other):
                exact = Exact(pairs, None if exact_q is q else exact_q, row=True)
                ours = packed_attention(q, k, v, scale=0.2, **rows, **options, beside=exact, _backend=backend)
                true = merged(q, k, v, rows, pairs, exact_q, 0.2, **options)
                for x, y in zip(ours, true, strict=True):
                    assert not mismatch(x, y, 8 * TOLERANCE[dtype]), (options, queries)
                exact = replace(exact, row=False, lse=False)
                out, *rest = packed_attention(q, k, v, scale=0.2, **rows, **options, beside=exact, _backend=backend)
                assert len(rest) == 1 and not mismatch(out, true[0], 8 * TOLERANCE[dtype])


@pytest.mark.parametrize("tile", [1 << 18, 48 * 32, 16 * 32])
@pytest.mark.parametrize("keys", ["channel", "token"])
@pytest.mark.parametrize("corrected", [False, True])
def test_many_queries_read_the_exact_tokens_with_the_last_tile(tile, keys, corrected, monkeypatch, dtype):
    """In one tile, in one for each run, and in three for each."""
    monkeypatch.setattr(CPU, "_TILE", tile)
    fused, calls = CPU._ATTEND, []
    monkeypatch.setattr(CPU, "_ATTEND", lambda *args, **more: calls.append(1) or fused(*args, **more))
    k, v, rows = cache((48, 48, 48, 48), keys=keys, rank=3 if corrected else 0, single=9 if corrected else 0)
    if corrected:  # one set of directions for each run, as gear has them
        run = ((torch.arange(k.blocks) + 1) // 4).clamp(max=3).int()
        k, v = (replace(x, lowrank=replace(x.lowrank, chunk=run)) for x in (k, v))
    pairs = [(randn(2, 2, r, 32, dtype=dtype), randn(2, 2, r, 32, dtype=dtype)) for r in (0, 5, 7)]
    q = randn(2, 6, 11, 32, dtype=dtype)  # 33 query rows of a run
    for options in ({}, {"centre": 3 * randn(4, 32)}):
        ours = packed_attention(q, k, v, scale=0.2, **rows, **options, beside=Exact(pairs))
        true = merged(q, k, v, rows, pairs, q, 0.2, **options)
        for x, y in zip(ours, true[:2], strict=True):
            assert not mismatch(x, y, 8 * TOLERANCE[dtype]), options
        # Keys with a scale per token have no channels that a centre could be added to.
        apart = keys == "token" and bool(options)
        assert len(calls) == (0 if apart else {1 << 18: 1, 48 * 32: 4, 16 * 32: 12}[tile])
        calls.clear()


def test_many_exact_tokens_of_half_precision_are_not_made_fp32():
    k, v, rows = cache((48, 48))
    q, pair = randn(1, 4, 1, 32, dtype=torch.bfloat16), randn(2, 1, 2, 600, 32, dtype=torch.bfloat16)
    ours = packed_attention(q, k, v, scale=0.2, **rows, beside=Exact([tuple(pair)], row=True))
    for x, y in zip(ours, merged(q, k, v, rows, [tuple(pair)], q, 0.2), strict=True):
        assert not mismatch(x, y, 8 * TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize(
    "wrong, line",
    [
        ((torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16)), r"beside\[0\]\[0\] has shape \[1, 2, 3, 16\]"),
        ((torch.ones(1, 2, 3, 32), torch.ones(1, 2, 4, 32)), r"beside\[0\]\[1\] has shape \[1, 2, 4, 32\]"),
        ((torch.ones(1, 2, 3, 32).half(), torch.ones(1, 2, 3, 32)), r"beside\[0\]\[0\] is torch.float16 and q is"),
    ],
)
def test_what_lies_beside_is_checked(wrong, line):
    k, v, rows = cache((48, 48))
    with pytest.raises(ValueError, match=line):
        packed_attention(randn(1, 4, 1, 32), k, v, scale=0.2, **rows, beside=Exact([wrong]))
