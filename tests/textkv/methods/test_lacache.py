"""LaCache in a model: cache positions against explicit rotation, streams, padded rows, turns, and what is refused."""

from itertools import pairwise

import pytest
import torch

from tests.textkv import tiny
from tests.textkv.methods.test_lacache_ladder import LAYOUTS, Stream
from textkv import MethodCache, resolve_method
from textkv.conformance import check_method
from textkv.kernels import rotate
from textkv.methods.lacache import LaCache, LaCacheOfficial, Ladder


def stream(model, cache, ids, chunk=1):
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(chunk, 1)], 1)


def kept(cache, layer=0, row=0):
    return [p for p in cache.kept_positions(layer)[row, 0].tolist() if p >= 0]


@pytest.fixture(scope="module")
def four_layers():
    torch.manual_seed(0)
    model = tiny.LlamaForCausalLM(tiny.LlamaConfig(**{**tiny.TEXT, "num_hidden_layers": 4})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(6)
    return model


@torch.no_grad()
def by_hand(model, blocks, naive, offsets, original=False):
    """Keys before the rotary embedding, all of them rotated to their slots at every step; logits of every block."""
    rotary, layers, out, seen = model.model.rotary_emb, model.model.layers, [], 0
    stored = [(None, None, []) for _ in layers]
    for tokens in blocks:
        m, hidden = tokens.shape[1], model.model.embed_tokens(tokens)
        now, seen = list(range(seen, seen + m)), seen + m
        naive.feed(*now)
        for i, block in enumerate(layers):
            attention, x = block.self_attn, block.input_layernorm(hidden)
            q, k, v = (
                p(x).view(1, m, -1, attention.head_dim).transpose(1, 2)
                for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            keys, values, ids = stored[i]
            keys, values = (k, v) if keys is None else (torch.cat([keys, k], 2), torch.cat([values, v], 2))
            ids = ids + now
            at = torch.tensor(ids) if original else torch.arange(len(ids))
            hidden = hidden + _attention(attention, q, keys, values, at, rotary.inv_freq)
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
            left = naive.held[offsets[i]]
            slots = torch.tensor([slot for slot, token in enumerate(ids) if token in set(left)])
            stored[i] = keys[:, :, slots], values[:, :, slots], left
        out.append(model.lm_head(model.model.norm(hidden)))
    return torch.cat(out, 1)


def _attention(attention, q, keys, values, at, inv_freq):
    m, n, group = q.shape[2], keys.shape[2], q.shape[1] // keys.shape[1]
    q, k = rotate(q, at[-m:], inv_freq), rotate(keys, at, inv_freq).repeat_interleave(group, 1)
    hidden = torch.ones(m, n, dtype=torch.bool).triu(n - m + 1)
    shares = (q @ k.mT * attention.scaling).masked_fill(hidden, -torch.inf).softmax(-1)
    mixed = shares @ values.repeat_interleave(group, 1)
    return attention.o_proj(mixed.transpose(1, 2).reshape(1, m, -1))


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        ("lacache(span=1,sinks=2)", (1, 0, "staircase")),
        ("lacache(span=2,overlap=1,layout='interleaved',sinks=2)", (2, 1, "interleaved")),
        ("lacache(span=1,sinks=0,positions='original')", (1, 0, "staircase")),
        ("lacache-official(span=1,sinks=2)", (1, 0, "interleaved")),
    ],
)
def test_equals_rotating_every_key_to_its_slot(four_layers, method, shape):
    """A prompt that needs a restart, a stream over several passes, a second turn: logits and kept tokens."""
    ladder, official = Ladder(4, *shape), "official" in method
    limit, sinks = 14 + official * (ladder.freed // 2), 0 if "sinks=0" in method else 2
    offsets = [ladder.offset(i, ladder.freed) for i in range(4)]
    naive = Stream(ladder, limit, sinks, 4, range(ladder.freed + 1))
    ids = tiny.text_ids(100)
    blocks = ids.split([25, *[1] * 50, 5, *[1] * 20], 1)
    expected = by_hand(four_layers, blocks, naive, offsets, original="original" in method)
    cache = MethodCache(four_layers, method, "14t")
    ours = torch.cat([stream(four_layers, cache, block, block.shape[1]) for block in blocks], 1)
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)
    assert naive.passes > 2 and [kept(cache, i) for i in range(4)] == [naive.held[o] for o in offsets]
    if "original" not in method:
        for layer in cache.layers:
            segment = layer.segments[0]
            assert segment.cache_positions().tolist() == [list(range(segment.used))]
            assert segment.gap.tolist() == [100 - segment.used]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layers_together_reach_further_than_a_window(four_layers, layout):
    cache = MethodCache(four_layers, f"lacache(span=1,layout='{layout}')", "20t")
    stream(four_layers, cache, tiny.text_ids(40), 40)
    sets = [kept(cache, i) for i in range(4)]
    assert all(len(ids) <= 20 and ids[:4] == [0, 1, 2, 3] and ids[-2:] == [38, 39] for ids in sets)
    assert len({len(ids) for ids in sets}) == 1 and len(set().union(*sets)) > 25
    if layout == "staircase":
        assert all(sum(a) < sum(b) for a, b in pairwise(sets))


def test_memory_is_constant_over_a_stream(four_layers):
    cache = MethodCache(four_layers, "lacache", "16t")
    ids = tiny.text_ids(90)
    stream(four_layers, cache, ids[:, :50], 50)
    before = cache.kv_bytes()
    out = stream(four_layers, cache, ids[:, 50:])
    assert cache.kv_bytes() == before and cache.get_seq_length() == 90 and bool(out.isfinite().all())


@pytest.mark.parametrize("positions", ["cache", "original"])
def test_rows_overflow_at_their_own_time(four_layers, positions):
    method = f"lacache(span=1,sinks=2,positions='{positions}')"
    ids, mask = tiny.text_ids(30, batch=2), torch.ones(2, 30, dtype=torch.int64)
    ids[1, :21], mask[1, :21] = 0, 0
    options = dict(do_sample=False, max_new_tokens=16)
    cache = MethodCache(four_layers, method, "14t")
    both = four_layers.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    for row, start in ((0, 0), (1, 21)):
        alone = MethodCache(four_layers, method, "14t")
        out = four_layers.generate(ids[row : row + 1, start:], past_key_values=alone, **options)
        assert torch.equal(both[row, start:], out[0])
        assert all(kept(cache, i, row) == kept(alone, i) for i in range(4))


def test_a_share_of_a_very_short_prompt_holds_one_block(four_layers):
    cache = MethodCache(four_layers, "lacache", 0.5)
    stream(four_layers, cache, tiny.text_ids(20), 4)
    assert [kept(cache, i)[-2:] for i in range(4)] == [[4, 19]] * 2 + [[18, 19]] * 2
    assert [len(kept(cache, i)) for i in range(4)] == [6] * 4
    with pytest.raises(ValueError, match=r"budget=0.5 is 2 tokens.*budget - sinks - layers >= 1.*2 - 4 - 4 = -6"):
        stream(four_layers, MethodCache(four_layers, "lacache-official", 0.5), tiny.text_ids(4), 4)


@pytest.mark.parametrize("family", tiny.VISION_FAMILIES)
def test_screenshots(model_of, family):
    """M-RoPE: both position schemes agree until something is dropped, and dropping works."""
    model = model_of(family)
    inputs, _ = tiny.screens(2)
    n = inputs["input_ids"].shape[1]
    runs = [
        model.generate(**inputs, past_key_values=MethodCache(model, f"lacache(positions='{p}')", f"{n + 9}t"),
                       do_sample=False, max_new_tokens=3)
        for p in ("cache", "original")
    ]  # fmt: skip
    assert torch.equal(*runs)
    cache = MethodCache(model, "lacache", "14t")
    model.generate(**inputs, past_key_values=cache, do_sample=False, max_new_tokens=3)
    assert [len(kept(cache, i)) for i in range(3)] == [14] * 3 and len({*kept(cache, 0)} ^ {*kept(cache, 2)}) > 4


@pytest.mark.parametrize(
    ("method", "budget"),
    [
        ("lacache", 0.4), ("lacache-official", 0.4), ("lacache(positions='original')", "24t"),
        ("lacache(span=1,sinks=0,recent=2,layout='interleaved')", "24t"),
    ],
)  # fmt: skip
def test_conforms(method, budget):
    outcomes = {check.name: check.outcome for check in check_method(method, budget)}
    declared = {
        "equals_masked_full_attention",  # what is kept changes while decoding, and keys move to cache positions
        "crop_or_refusal",  # what the ladder has dropped, a crop cannot bring back
    }
    if not resolve_method(method, budget).capabilities.original_positions:
        declared.add("forgotten_tokens_are_gone")  # slots close up behind them, which the oracle's positions do not
    assert {n for n, o in outcomes.items() if o != "passed"} == declared


@pytest.mark.parametrize(
    ("method", "budget", "message"),
    [
        ("lacache", "5t", "budget=5t: 4 sinks and one ladder block of 2 tokens need 6t or more"),
        ("lacache(span=1,recent=2)", "20t", "recent=2: with 4 layers each block frees 3 tokens"),
        ("lacache(span=4)", "20t", "span=4: a ladder needs"),
        ("lacache-official", "8t", r"budget - sinks - layers >= 1.*8 - 4 - 4 = 0: use 9t or more"),
        ("lacache-official(span=2,overlap=1)", "9t", r"budget - sinks - layers >= 2.*use 10t or more"),
        ("lacache-official", "2000t", "rotary table has 1024 positions, so budget <= 1024t"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(four_layers, method, budget, message):
    with pytest.raises(ValueError, match=message):
        MethodCache(four_layers, method, budget)


def test_a_budget_beyond_the_trained_length_warns(four_layers):
    with pytest.warns(UserWarning, match="budget=2000t is longer than the 1024 positions"):
        stream(four_layers, MethodCache(four_layers, "lacache", "2000t"), tiny.text_ids(4), 4)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="sinks=-1: cannot be negative"):
        LaCache(sinks=-1)
    with pytest.raises(ValueError, match="layout='spiral': use 'staircase' or 'interleaved'"):
        LaCache(layout="spiral")
    with pytest.raises(ValueError, match="positions='slots': use 'cache' or 'original'"):
        LaCache(positions="slots")
    with pytest.raises(ValueError, match="layout='staircase', recent=None: the authors' code is interleaved"):
        LaCacheOfficial(layout="staircase")
    with pytest.raises(ValueError, match="recent=8: the authors' code is interleaved"):
        LaCacheOfficial(recent=8)
