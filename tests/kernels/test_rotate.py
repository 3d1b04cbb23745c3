from __future__ import annotations

import pytest
import torch

from tests.kernels.helpers import mismatch, randn
from textkv.kernels import rotate

BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])
LAYOUTS = pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])


def frequencies(half):
    return 1.0 / 10000.0 ** (torch.arange(half) / half)


def naive(x, delta, inv_freq):
    """Every pair (x1, x2) as a complex number in float64, turned by exp(i angle); delta [B, n]."""
    half = inv_freq.numel()
    x, out = x.double(), x.double().clone()
    angle = (delta.double()[..., None] * inv_freq.double())[:, None]
    pairs = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones_like(angle), angle)
    out[..., :half], out[..., half : 2 * half] = pairs.real, pairs.imag
    return out


def model_rope(family, x, positions, sections):
    """RoPE as transformers applies it to keys: x [B, G, n, D], positions [3, B, n]; also returns the inv_freq."""
    theta = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    shared = {"hidden_size": 4 * x.shape[-1], "num_attention_heads": 4, "rope_parameters": theta}
    if family == "qwen2_5_vl":
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling
        from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig as Config

        rope = modeling.Qwen2_5_VLRotaryEmbedding(Config(**shared))
    else:
        from transformers.models.qwen3_vl import modeling_qwen3_vl as modeling
        from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig as Config

        rope = modeling.Qwen3VLTextRotaryEmbedding(Config(**shared, head_dim=x.shape[-1]))
    cos, sin = rope(x, positions)
    if cos.dim() == 4:  # before transformers recomposed the frequencies here, three rows came back
        cos, sin = (modeling_rows(rows, sections) for rows in (cos, sin))
    return modeling.apply_rotary_pos_emb(x, x, cos, sin)[1], rope.inv_freq


def modeling_rows(rows, sections):
    return torch.cat([part[i % 3] for i, part in enumerate(rows.split(list(sections) * 2, dim=-1))], dim=-1)


@pytest.mark.parametrize(
    "B, G, n, D, half", [(1, 1, 1, 64, 32), (2, 3, 40, 80, 40), (1, 2, 33, 128, 16), (1, 1, 5, 96, 48)]
)
@BACKENDS
def test_equals_complex_rotation(B, G, n, D, half, backend, dtype, interpreted):
    x, delta = randn(B, G, n, D, dtype=dtype), torch.randint(-90_000, 90_000, (B, n))
    ours = rotate(x, delta, frequencies(half), _backend=backend)
    truth = naive(x, delta, frequencies(half)).to(dtype)
    assert not mismatch(ours, truth, 1e-5 if dtype == torch.float32 else 2.0**-6)
    assert torch.equal(ours[..., 2 * half :], x[..., 2 * half :])


@BACKENDS
@LAYOUTS
def test_moves_a_key_of_a_vision_model_to_another_position(family, backend, interpreted):
    x, sections = randn(2, 2, 20, 64), [8, 12, 12]
    old, new = torch.randint(0, 500, (2, 3, 2, 20))
    at_old, inv_freq = model_rope(family, x, old, sections)
    at_new, _ = model_rope(family, x, new, sections)
    interleaved = family == "qwen3_vl"
    ours = rotate(at_old, new - old, inv_freq, sections=sections, interleaved=interleaved, _backend=backend)
    assert not mismatch(ours, at_new, 1e-4)  # the model's own fp32 angles are off by 3e-5 rad at position 500


@BACKENDS
@pytest.mark.parametrize("interleaved", [False, True], ids=["contiguous", "interleaved"])
def test_three_equal_axes_are_plain_rope(interleaved, backend, interpreted):
    x, delta = randn(2, 2, 20, 64), torch.randint(-50, 50, (2, 20))
    options = {"sections": (10, 11, 11), "interleaved": interleaved, "_backend": backend}
    plain = rotate(x, delta, frequencies(32), _backend=backend)
    assert torch.equal(rotate(x, delta.expand(3, 2, 20), frequencies(32), **options), plain)
    assert torch.equal(rotate(x, delta, frequencies(32), **options), plain)


@BACKENDS
def test_there_and_back_and_in_two_steps(backend, interpreted):
    x, inv_freq = randn(1, 2, 10, 64), frequencies(32)
    away = rotate(x, torch.tensor(1234), inv_freq, _backend=backend)
    assert not mismatch(rotate(away, torch.tensor(-1234), inv_freq, _backend=backend), x)
    further = rotate(away, torch.tensor(766), inv_freq, _backend=backend)
    assert not mismatch(further, rotate(x, torch.tensor(2000), inv_freq, _backend=backend))
    assert not mismatch(away.square().sum(-1), x.square().sum(-1), 1e-4)


@BACKENDS
def test_by_nothing_is_bit_equal(backend, dtype, interpreted):
    x = randn(1, 2, 40, 64, dtype=dtype)
    x[0, 0, 3, :4] = torch.tensor([-0.0, 0.0, float("inf"), 1e-30])
    delta = torch.arange(40) // 20  # the second half moves
    ours = rotate(x, delta, frequencies(32), _backend=backend)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(ours[:, :, :20].contiguous().view(bits), x[:, :, :20].contiguous().view(bits))
    assert not torch.equal(ours[:, :, 20:], x[:, :, 20:])
    assert ours.data_ptr() != x.data_ptr()


@BACKENDS
@pytest.mark.parametrize("kind", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_shapes_and_kinds_of_delta(kind, backend, interpreted):
    x, delta = randn(2, 3, 20, 64).transpose(1, 2).contiguous().transpose(1, 2), torch.randint(-9, 9, (20,)).to(kind)
    truth = rotate(x, delta.expand(2, 20), frequencies(32))
    assert not mismatch(rotate(x, delta, frequencies(32), _backend=backend), truth)
    scalar = rotate(x, delta[3], frequencies(32), _backend=backend)
    assert not mismatch(scalar, naive(x, delta[3].expand(2, 20), frequencies(32)).float())


@BACKENDS
def test_half_a_position(backend, interpreted):
    x, inv_freq = randn(1, 1, 4, 64), frequencies(32)
    twice = rotate(
        rotate(x, torch.tensor(0.5), inv_freq, _backend=backend), torch.tensor(0.5), inv_freq, _backend=backend
    )
    assert not mismatch(twice, rotate(x, torch.tensor(1), inv_freq))


X, FREQ, DELTA = torch.zeros(2, 1, 5, 16), torch.ones(8), torch.zeros(3, 2, 5)


@pytest.mark.parametrize(
    "x, delta, inv_freq, options, message",
    [
        (X[0], DELTA[0], FREQ, {}, r"x has shape \[1, 5, 16\]; it must be \[B, G, n, D\]"),
        (X, DELTA[0], torch.ones(9), {}, r"inv_freq has shape \[9\]; the limit is D / 2 = 8"),
        (X, DELTA[0], FREQ.half(), {}, "inv_freq is float16; it must be float32 or float64"),
        (X, DELTA[0, :, :4], FREQ, {}, r"delta has shape \[2, 4\]; it must be \[2, 5\]"),
        (X, DELTA[0].bool(), FREQ, {}, "delta is bool; it must be int32 or int64 or float32 or float64"),
        (X, 3, FREQ, {}, "delta=3 must be a tensor"),
        (X, DELTA, FREQ, {}, r"delta has shape \[3, 2, 5\], three axes; pass the model's mrope_section as sections"),
        (X, DELTA, FREQ, {"sections": [4, 4]}, r"sections=\[4, 4\] must be three sizes \(t, h, w\) with the sum 8"),
        (X, DELTA, FREQ, {"sections": [4, 4, 4]}, r"sections=\[4, 4, 4\] must be three sizes"),
    ],
)
def test_errors_name_the_argument(x, delta, inv_freq, options, message):
    with pytest.raises(ValueError, match=message):
        rotate(x, delta, inv_freq, **options)
