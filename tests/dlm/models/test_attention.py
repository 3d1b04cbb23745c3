"""The attention function, and the ways in which a cache may step into a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dlm.models.attention import attention, full_attention
from dlm.models.backbone import Layer, Rope
from tests.compare import mismatch
from tests.dlm.models.test_networks import FAMILIES, build, ids_of


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_a_loop_over_heads_and_queries(heads: int, kv_heads: int, masked: bool) -> None:
    q, k, v = draw(2, heads, 3, 8), draw(2, kv_heads, 5, 8, seed=1), draw(2, kv_heads, 5, 8, seed=2)
    visible = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0]]).bool() if masked else None
    got = full_attention(q, k, v, scale=8**-0.5, visible=visible)
    for b in range(2):
        for h in range(heads):
            for i in range(3):
                seen = [j for j in range(5) if visible is None or visible[b, j]]
                g = h // (heads // kv_heads)
                weights = [math.exp(float(q[b, h, i] @ k[b, g, j]) / 8**0.5) for j in seen]
                expected = sum(w * v[b, g, j] for w, j in zip(weights, seen, strict=True)) / sum(weights)
                assert not mismatch(got[b, h, i], expected, rtol=1e-5, atol=1e-5)


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_row_without_a_visible_key_gives_zeros(device: str, dtype: torch.dtype, kv_heads: int) -> None:
    q, k, v = (draw(2, heads, 3, 8).to(device, dtype) for heads in (4, kv_heads, kv_heads))
    out = full_attention(q, k, v, 1.0, torch.tensor([[0] * 3, [1] * 3], device=device))
    assert bool((out[0] == 0).all()) and bool(out[1].isfinite().all()) and bool((out[1] != 0).any())


def test_a_mask_that_is_not_two_dimensional_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention mask of shape \(2, 1, 3, 3\): give the key mask \[batch, keys\]"):
        attention(None, draw(2, 4, 3, 8), draw(2, 4, 3, 8), draw(2, 4, 3, 8), torch.ones(2, 1, 3, 3))


@dataclass
class View:
    k: torch.Tensor
    v: torch.Tensor
    layer: Any


class SlotLayer:
    """Keys and values by slot; what is not written holds NaN, so that a wrong read shows."""

    def __init__(self, slots: int) -> None:
        self.slots, self.place = slots, slice(None)
        self.k: torch.Tensor | None = None

    def step(self, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None):
        if self.k is None:
            self.k = k.new_full((*k.shape[:2], self.slots, k.shape[3]), torch.nan)
            self.v = self.k.clone()
        self.k[:, :, self.place], self.v[:, :, self.place] = k, v
        return full_attention(query, self.k, self.v, scale, mask)


class Slots:
    """The smallest cache that a decoder could bring."""

    def __init__(self, layers: int, slots: int) -> None:
        self.layers = [SlotLayer(slots) for _ in range(layers)]

    def at(self, place: slice) -> Slots:
        for layer in self.layers:
            layer.place = place
        return self

    def update(self, k: torch.Tensor, v: torch.Tensor, layer_idx: int) -> tuple[View, View]:
        view = View(k, v, self.layers[layer_idx])
        return view, view


@FAMILIES
def test_a_window_over_cached_slots_equals_the_whole_canvas(family: str) -> None:
    model, ids, cache = build(family), ids_of(2, 8), Slots(2, 8)
    positions, visible = torch.arange(8).expand(2, -1), torch.tensor([[1] * 8, [0, 0] + [1] * 6]).bool()
    with torch.no_grad():
        whole = model(ids, attention_mask=visible, position_ids=positions).logits
        first = model(ids, attention_mask=visible, position_ids=positions, past_key_values=cache.at(slice(0, 8))).logits
        window = slice(3, 6)
        part = model(
            ids[:, window], attention_mask=visible, position_ids=positions[:, window], past_key_values=cache.at(window)
        ).logits
    assert not mismatch(first, whole, rtol=1e-6, atol=1e-6)
    assert not mismatch(part, whole[:, window], rtol=1e-5, atol=1e-5)


class Driver:
    """Takes each layer apart as a policy that reuses layer outputs does: values first, then some rows of the rest."""

    drives_layers = True

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows, self.seen = rows, []

    def drive(self, layer: Layer, hidden: torch.Tensor, rope: Rope, mask: torch.Tensor | None) -> torch.Tensor:
        self.seen.append((layer.layer_idx, tuple(hidden.shape)))
        normed = layer.input_norm(hidden)
        v = layer.v(normed)
        _, k = layer.qk(normed, rope)
        q, _ = layer.qk(normed[:, self.rows], tuple(table[:, :, self.rows] for table in rope))
        out = hidden.clone()
        out[:, self.rows] += layer.attend(q, k, v, mask)
        out[:, self.rows] += layer.ffn(out[:, self.rows])
        return out


@FAMILIES
def test_a_cache_may_drive_the_layers_in_pieces(family: str) -> None:
    model, ids = build(family), ids_of(2, 6)
    positions = torch.arange(6)[None].expand(2, -1)
    driver = Driver(torch.arange(6))
    with torch.no_grad():
        got = model(ids, position_ids=positions, past_key_values=driver).logits
        assert not mismatch(got, model(ids).logits, rtol=1e-6, atol=1e-6)
        model(ids, position_ids=positions, past_key_values=(some := Driver(torch.tensor([1, 4]))))
    width = model.config.hidden_size
    assert driver.seen == some.seen == [(0, (2, 6, width)), (1, (2, 6, width))]
