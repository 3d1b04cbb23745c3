"""TriAttention's rounds while decoding: a plain simulation, heads and layers that choose together, what must stay."""

import pytest
import torch

from tests.textkv import tiny
from tests.textkv.methods.test_h2o import blocks_of, one_layer_model
from textkv import MethodCache

DIM = 16


def tokens(n, heads=2, group=2, batch=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, h, n, DIM, generator=g) for h in (heads * group, heads, heads))


def feed(name, budget, q, k, v, blocks):
    """Runs one layer over blocks [start, stop) of tokens and yields it after each."""
    cache = MethodCache(one_layer_model(), name, budget)
    layer = cache.layers[0]
    layer.lazy_initialization(k[:, :, :0], v[:, :, :0])
    for start, stop in blocks:
        layer.feed(q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop], 1.0)
        yield layer


def simulate(q, k, blocks, limits, interval, sinks, spec):
    """Kept positions after each block of one KV head, in doubles: q [group, n, DIM], k [n, DIM] post-RoPE."""
    back = spec.turn(q[None].float(), -torch.arange(q.shape[1])[None])[0].double()
    pairs = torch.complex(back[..., spec.first], back[..., spec.second])
    held, counted = [], []
    for (start, stop), limit in zip(blocks, limits, strict=True):
        held += range(start, stop)
        counted += range(start, stop) if stop - start > 1 else []
        if len(held) < limit + (interval if stop - start == 1 else 1):
            yield [*held]
            continue
        worth = torch.full((len(q), len(held)), torch.inf).double()
        free = [i for i, p in enumerate(held) if p >= sinks]
        for head in range(len(q)):
            mean, pair = back[head, counted].mean(0), pairs[head, counted]
            rest = pair.abs().mean(0) - pair.mean(0).abs()
            ahead = [spec.turn(mean.float()[None, None, None], torch.tensor([[stop + 2**d]])) for d in range(17)]
            ahead = sum(a[0, 0, 0].double() for a in ahead) / 17
            far = [torch.complex(k[held[i]][spec.first], k[held[i]][spec.second]).abs().double() for i in free]
            raw = torch.stack([ahead @ k[held[i]].double() + rest @ r for i, r in zip(free, far, strict=True)])
            worth[head, free] = (raw - raw.mean()) / raw.std(correction=0)
        best = sorted(range(len(held)), key=lambda i: (-worth[:, i].max(), i))[:limit]
        held = sorted(held[i] for i in best)
        yield [*held]


@pytest.mark.parametrize("group", [1, 2])
def test_it_does_what_a_plain_simulation_does(group):
    """Two turns and decoding, two rows, two KV heads: kept sets at every step, centres of both turns together."""
    blocks = blocks_of(20, 1, 1, 1, 1, 1, 9, 1, 1, 1)
    q, k, v = tokens(37, group=group, batch=2)
    limits = [8] * 6 + [13] * 4  # 0.4 of 20, then 0.4 of the 34 seen after the second turn
    layers = list(zip(blocks, feed("tri_attention(3,sinks=2)", 0.4, q, k, v, blocks), strict=True))
    spec = layers[0][1].rotary
    expected = {
        (b, h): list(simulate(q[b, h * group : (h + 1) * group], k[b, h], blocks, limits, 3, 2, spec))
        for b in range(2)
        for h in range(2)
    }
    for step, layer in enumerate(feed("tri_attention(3,sinks=2)", 0.4, q, k, v, blocks)):
        for (b, h), states in expected.items():
            assert layer.stored().positions[b, h].tolist() == sorted(states[step]), f"step {step}, row {b}, head {h}"
    assert [len(s) for s in expected[0, 0]] == [8, 9, 10, 8, 9, 10, 13, 14, 15, 13]


def kept_of(cache, row=0):
    return [[[p for p in head if p >= 0] for head in layer.held_positions()[row].tolist()] for layer in cache.layers]


@pytest.mark.parametrize("mode", ["per_layer_perhead", "per_head", "union"])
def test_which_heads_and_layers_choose_together(model_of, mode):
    model, ids = model_of("llama"), tiny.text_ids(60)
    cache = MethodCache(model, f"tri_attention(4,mode='{mode}')", "16t")
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        prompt = kept_of(cache)
        for token in range(40, 53):
            model(ids[:, token : token + 1], past_key_values=cache)
    for kept in (prompt, kept_of(cache)):
        layers = {str(layer) for layer in kept}
        heads = {str(head) for layer in kept for head in layer}
        assert (len(layers) == 1) == (mode != "per_layer_perhead") and (len(heads) == 1) == (mode == "union")
    assert {len(head) for layer in kept for head in layer} == {17}


@pytest.mark.parametrize("mode", ["per_head", "union"])
def test_a_model_of_one_layer_is_judged_as_its_layer_alone(mode):
    """One layer: `per_head` is each head's own choice; one KV head besides: so is `union`."""
    heads = 2 if mode == "per_head" else 1
    q, k, v = tokens(40, heads=heads)
    blocks = blocks_of(30, *[1] * 10)
    together = feed(f"tri_attention(4,mode='{mode}')", "12t", q, k, v, blocks)
    for own, shared in zip(feed("tri_attention(4)", "12t", q, k, v, blocks), together, strict=True):
        assert torch.equal(own.stored().positions, shared.stored().positions)


def test_rows_of_a_batch_are_what_each_is_alone(model_of):
    """Padded rows under one ceiling: a short row has its rounds later, by its own positions and centres."""
    model, ids = model_of("llama"), tiny.text_ids(60, batch=3)
    mask = torch.ones(3, 60, dtype=torch.long)
    mask[1, :18], mask[2, :25] = 0, 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    for name in ("tri_attention(5)", "tri_attention(5,mode='union')"):
        cache = MethodCache(model, name, "16t")
        alone = [MethodCache(model, name, "16t") for _ in range(3)]
        with torch.no_grad():
            for part in [slice(0, 30), *(slice(i, i + 1) for i in range(30, 60))]:
                both = {"attention_mask": mask[:, : part.stop], "position_ids": places[:, part]}
                model((ids * mask)[:, part], past_key_values=cache, **both)
                for row, start in enumerate((0, 18, 25)):
                    own = slice(max(start, part.start), part.stop)
                    model(ids[row : row + 1, own], past_key_values=alone[row])
                    assert kept_of(cache, row) == kept_of(alone[row]), f"{name}, row {row}, token {part.stop}"


@pytest.mark.parametrize("budget", ["16t", 0.4])
def test_what_is_protected_stays(model_of, budget):
    model, ids = model_of("llama"), tiny.text_ids(80)
    cache = MethodCache(model, "tri_attention(4,sinks=3,window=5)", budget)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        for token in range(40, 80):
            model(ids[:, token : token + 1], past_key_values=cache)
            for head in (head for layer in kept_of(cache) for head in layer):
                assert head[:3] == [0, 1, 2] and head[-5:] == list(range(token - 4, token + 1))
                assert 16 <= len(head) < 20


def test_a_pinned_prompt_stays_and_must_leave_room(model_of):
    model, ids = model_of("llama"), tiny.text_ids(80)
    cache = MethodCache(model, "tri_attention(4,pin_prompt=True)", "40t")
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        for token in range(20, 60):
            model(ids[:, token : token + 1], past_key_values=cache)
        assert all(head[:20] == list(range(20)) and 40 <= len(head) < 44 for x in kept_of(cache) for head in x)
        model(ids[:, 60:70], past_key_values=cache)
        for token in range(70, 80):
            model(ids[:, token : token + 1], past_key_values=cache)
        assert all({*range(20), *range(60, 70)} <= {*head} and len(head) < 44 for x in kept_of(cache) for head in x)
        full = MethodCache(model, "tri_attention(pin_prompt=True,window=2)", "40t")
        with pytest.raises(ValueError, match="a pinned prompt of 38 tokens and window=2 leave nothing .* use 41t or"):
            model(ids[:, :38], past_key_values=full)
