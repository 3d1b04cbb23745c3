from __future__ import annotations

from importlib import import_module

import pytest
import torch

from tests.kernels.helpers import mismatch
from textkv.kernels import coded_attention, decode_attention
from textkv.kernels.codebook import decode, encode, turn_back

SCALE = 0.3
CPU = import_module("textkv.kernels._coded_cpu")
MODULE = import_module("textkv.kernels.coded_attention")  # `kernels.coded_attention` is the function


def cached(B, G, n, D, bits=(4, 4), marked=0.0):
    """Rows of random keys and values, a share of them marked; their signs, and the vectors that they stand for."""
    signs = torch.randint(0, 2, (2, D)).float() * 2 - 1
    rows, stand_for = [], []
    for i in range(2):
        rows.append(encode(torch.randn(B, G, n, D), signs[i], bits[i], marked=torch.rand(B, G, n) < marked))
        c, size = decode(rows[i], bits[i], D)
        stand_for.append(turn_back(c * size.abs()[..., None], signs[i]))
    return rows, signs, stand_for


def assert_same(found, true, tolerance=2e-5):
    for ours, expected in zip(found, true, strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "B, H, G, m, n, D", [(1, 1, 1, 1, 1, 8), (2, 6, 2, 1, 70, 24), (1, 4, 4, 3, 33, 128), (2, 4, 1, 600, 40, 16)]
)
@pytest.mark.parametrize("bits", [(4, 4), (3, 2), (2, 4), (8, 1)])
def test_as_over_what_the_codes_stand_for(B, H, G, m, n, D, bits, monkeypatch):
    (k, v), signs, stand_for = cached(B, G, n, D, bits)
    q, true = torch.randn(B, H, m, D), None
    true = decode_attention(q, *stand_for, scale=SCALE)
    assert_same(coded_attention(q, k, v, bits=bits, signs=signs, scale=SCALE), true)
    monkeypatch.setattr(MODULE, "_NUMBERS", 1)  # tiles of 16 tokens
    monkeypatch.setattr(CPU, "_TILE", 1)
    assert_same(coded_attention(q, k, v, bits=bits, signs=signs, scale=SCALE), true)


@pytest.mark.parametrize("bits", [(4, 4), (3, 1), (8, 2)])
@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize(
    "tile, scores, tokens, rows", [(1, 1, 40, 256), (1 << 12, 1 << 9, 64, 16), (1 << 18, 1 << 17, 8192, 8)]
)
def test_the_cpu_s_path_is_the_reference(bits, queries, tile, scores, tokens, rows, monkeypatch):
    for name, value in {"_TILE": tile, "_SCORES": scores, "_TOKENS": tokens, "_FEWEST": 16, "_ROWS": rows}.items():
        monkeypatch.setattr(CPU, name, value)
    (k, v), signs, _ = cached(2, 2, 100, 24, bits, marked=0.3)
    q, centre, valid = torch.randn(2, 6, queries, 24), torch.randn(2, 2, 24), torch.rand(2, 1, 100) > 0.3
    valid[1] = False
    turned = {"inv_freq": torch.rand(2, 2, 5), "positions": torch.randint(0, 90, (2, 2, 100)).int()}
    plain = {"bits": bits, "signs": signs, "scale": SCALE}
    for options in (
        {},
        {"softcap": 2.0},
        {"centre": centre, "valid": valid},
        {"centre": centre, "softcap": 2.0} | turned,
    ):
        ours, true = (coded_attention(q, k, v, **plain, **options, _backend=x) for x in ("fused", "reference"))
        assert not mismatch(ours, true, 3e-5), options


@pytest.mark.parametrize("how", ["fused", "reference", "triton"])
@pytest.mark.parametrize("queries, more", [(1, 1), (3, 5)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_exact_tokens_beside_the_codes_are_in_the_same_softmax(how, queries, more, softcap, monkeypatch):
    monkeypatch.setattr(CPU, "_TOKENS", 20)
    (k, v), signs, (keys, values) = cached(2, 2, 50, 16)
    q, beside = torch.randn(2, 4, queries, 16), (torch.randn(2, 2, more, 16), torch.randn(2, 2, more, 16))
    valid = torch.rand(2, 2, 50) > 0.5
    valid[1, 1] = False  # of the codes, nothing
    every = [torch.cat(x, 2) for x in ((keys, beside[0]), (values, beside[1]))]
    for shown in (None, valid):
        seen = None if shown is None else torch.cat([shown, torch.ones(2, 2, more, dtype=torch.bool)], 2)
        found = coded_attention(
            q, k, v, bits=(4, 4), signs=signs, scale=SCALE, softcap=softcap, valid=shown, beside=beside, _backend=how
        )
        assert_same(found, decode_attention(q, *every, scale=SCALE, softcap=softcap, valid=seen))


def test_what_lies_beside_the_codes_is_checked():
    (k, v), signs, _ = cached(1, 2, 5, 16)
    q, beside = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 1, 8)
    with pytest.raises(ValueError, match=r"beside\[0\] has shape"):
        coded_attention(q, k, v, bits=(4, 4), signs=signs, scale=SCALE, beside=(beside, beside))


@pytest.mark.parametrize("some", [False, True])
def test_heads_at_the_same_places_share_the_cosines_of_their_centres(some):
    (k, v), signs, _ = cached(1, 3, 70, 16)
    centre, common = torch.randn(1, 3, 16), torch.rand(1, 1, 6)
    inv_freq = torch.cat([common, common * (0 if some else 1), common], 1)  # one that stands still
    turned = {"inv_freq": inv_freq, "positions": torch.randint(0, 90, (1, 1, 70)).int()}
    how = {"bits": (4, 4), "signs": signs, "scale": SCALE, "centre": centre}
    q = torch.randn(1, 6, 1, 16)
    together = coded_attention(q, k, v, **how, **turned)
    apart = turned | {"positions": turned["positions"].expand(1, 3, 70).contiguous()}
    assert_same(together, coded_attention(q, k, v, **how, **apart))


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("shared", [False, True])
def test_a_centre_comes_back_in_the_scores_of_keys_that_are_not_marked(turns, softcap, shared, monkeypatch):
    monkeypatch.setattr(MODULE, "_NUMBERS", 1)
    monkeypatch.setattr(CPU, "_TILE", 1)
    B, G, n, D, R = 2, 2, 50, 16, 12
    (k, v), signs, (keys, values) = cached(B, G, n, D, marked=0.3)
    centre, q = 2 * torch.randn(B, G, D), torch.randn(B, 4, 2, D)
    positions = torch.randint(0, 90, (B, 1 if shared else G, n)).int()
    inv_freq = (10.0 ** -torch.arange(R // 2)).repeat(B, G, 1)
    added = centre[:, :, None].expand(B, G, n, D)
    if turns:
        angle = positions[..., None] * inv_freq[:, :, None]
        first, second, still = added.split((R // 2, R // 2, D - R), -1)
        cos, sin = angle.cos(), angle.sin()
        added = torch.cat([first * cos - second * sin, second * cos + first * sin, still], -1)
    added = added * ~decode(k, 4, D)[1][..., None].signbit()  # marked keys were coded without
    options = {"inv_freq": inv_freq, "positions": positions} if turns else {}
    found = coded_attention(q, k, v, bits=(4, 4), signs=signs, scale=SCALE, centre=centre, softcap=softcap, **options)
    assert_same(found, decode_attention(q, keys + added, values, scale=SCALE, softcap=softcap), 5e-5)


@pytest.mark.parametrize("heads", [1, 2])
def test_tokens_that_are_not_seen_may_hold_anything(heads, monkeypatch):
    monkeypatch.setattr(MODULE, "_NUMBERS", 1)
    monkeypatch.setattr(CPU, "_TILE", 1)
    (k, v), signs, stand_for = cached(2, 2, 50, 16)
    valid = torch.rand(2, heads, 50) > 0.5
    valid[1, -1] = False  # nothing at all
    true = decode_attention(torch.ones(2, 4, 1, 16), *stand_for, scale=SCALE, valid=valid.expand(2, 2, 50).contiguous())
    for x in (k, v):
        x[~valid.expand(2, 2, 50)] = 255  # NaN in the scale
    found = coded_attention(torch.ones(2, 4, 1, 16), k, v, bits=(4, 4), signs=signs, scale=SCALE, valid=valid)
    assert_same(found, true)
    assert bool((found[0][1, -1] == 0).all()) and bool((found[1][1, -1] == -torch.inf).all())


@pytest.mark.parametrize("bits", [(4, 4), (3, 2), (1, 8), (5, 6)])
@pytest.mark.parametrize(
    ("B", "H", "G", "m", "n", "D"), [(1, 1, 1, 1, 1, 8), (2, 6, 2, 1, 200, 24), (1, 4, 2, 40, 90, 64)]
)
def test_the_kernel_is_the_reference(B, H, G, m, n, D, bits):
    (k, v), signs, _ = cached(B, G, n + 9, D, bits, marked=0.3)
    k, v = k[:, :, 4 : n + 4], v[:, :, :n]  # as in a buffer with room
    q = torch.randn(B, H, m, D)
    centre, valid = torch.randn(B, G, D), torch.rand(B, 1, n) > 0.3
    plain = {"bits": bits, "signs": signs, "scale": SCALE}
    turned = {"inv_freq": torch.rand(B, G, D // 4), "positions": torch.randint(0, 90, (B, G, n)).int()}
    for options in (
        {}, {"softcap": 2.0}, {"valid": valid}, {"centre": centre, "valid": valid.expand(B, G, n)},
        {"centre": centre, "softcap": 2.0} | turned,
    ):  # fmt: skip
        ours = coded_attention(q, k, v, **plain, **options, _backend="triton")
        assert not mismatch(ours, coded_attention(q, k, v, **plain, **options, _backend="reference"), 3e-5), options


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.bfloat16, 2e-2)])
def test_the_kernel_in_several_splits(dtype, tolerance, monkeypatch):
    (k, v), signs, _ = cached(2, 1, 300, 16)
    monkeypatch.setattr(MODULE, "split_length", lambda n, tiles, x: 64)
    q, valid = torch.randn(2, 2, 3, 16).to(dtype), torch.ones(2, 1, 300, dtype=torch.bool)
    valid[1, :, :200] = False  # whole splits of nothing
    found = coded_attention(q, k, v, bits=(4, 4), signs=signs, scale=SCALE, valid=valid, _backend="triton")
    assert not mismatch(found, coded_attention(q, k, v, bits=(4, 4), signs=signs, scale=SCALE, valid=valid), tolerance)


@pytest.mark.parametrize("backend", ["reference", "fused", "triton"])
def test_rows_that_are_not_seen_poison_nothing(backend):
    (k, v), signs, _ = cached(1, 2, 70, 16)
    valid, q = torch.rand(1, 2, 70) > 0.5, torch.randn(1, 4, 1, 16)
    given = {"bits": (4, 4), "signs": signs, "scale": SCALE, "valid": valid, "_backend": backend}
    true = coded_attention(q, k, v, **given)
    for x in (k, v):
        x[~valid] = 255  # NaN in the scale
    assert not mismatch(coded_attention(q, k, v, **given), true)


def test_no_token_at_all_and_half_precision():
    (k, v), signs, (keys, values) = cached(1, 2, 9, 16)
    out, lse = coded_attention(torch.randn(1, 4, 1, 16), k[:, :, :0], v[:, :, :0], bits=(4, 4), signs=signs, scale=1.0)
    assert bool((out == 0).all()) and bool((lse == -torch.inf).all())
    q = torch.randn(1, 4, 2, 16).bfloat16()
    out, lse = coded_attention(q, k, v, bits=(4, 4), signs=signs.to(torch.int8), scale=SCALE)
    true = decode_attention(q.float(), keys, values, scale=SCALE)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(out.float(), true[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse, true[1], rtol=1e-5, atol=1e-5)


(K, V), SIGNS, _ = cached(1, 2, 5, 16)
Q = torch.zeros(1, 4, 1, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 3, 1, 16)}, "q has 3 heads and k has 2"),
        ({"k": K[..., :-1]}, r"k has shape \[1, 2, 5, 9\]; it must be \[1, G, n, 10\]"),
        ({"v": V.float()}, "v is float32; it must be uint8"),
        ({"bits": (4, 3)}, r"v has shape \[1, 2, 5, 10\]; it must be \[1, 2, 5, 8\]"),
        ({"signs": SIGNS[0]}, r"signs has shape \[16\]; it must be \[2, 16\]"),
        ({"valid": torch.ones(1, 1, 4, dtype=torch.bool)}, r"valid has shape \[1, 1, 4\]"),
        ({"softcap": 0.0}, "softcap=0.0 must be above 0"),
        ({"inv_freq": torch.zeros(1, 2, 4), "centre": torch.zeros(1, 2, 16)}, "pass centre and positions with them"),
    ],
)
def test_errors_name_the_argument(change, message):
    given = {"q": Q, "k": K, "v": V, "bits": (4, 4), "signs": SIGNS, "scale": 1.0} | change
    with pytest.raises(ValueError, match=message):
        coded_attention(**given)
