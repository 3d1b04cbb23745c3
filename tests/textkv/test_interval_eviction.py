"""Rounds: when they come, what they cut back to, what they cost in between."""

import pytest
import torch

from tests.textkv import tiny
from textkv import MethodCache, resolve_method
from textkv.interval_eviction import BASE
from textkv.mini import load_mini
from textkv.mini.tasks import make_example
from textkv.tri_attention.calibrate import calibrate
from textkv.tri_attention.centres import FILE

METHODS = ["tri_attention(8)", "tri_attention(8,mode='union')", "rkv(8)"]


def sizes(model, name, budget, prompt, decoded):
    """Tokens that each layer holds after the prompt and after each decoded token."""
    ids, cache, seen = tiny.text_ids(prompt + decoded), MethodCache(model, name, budget), []
    with torch.no_grad():
        for part in (ids[:, :prompt], *ids[:, prompt:].split(1, 1)):
            model(part, past_key_values=cache)
            found = {int(n) for layer in cache.layers for n in layer.lengths().flatten()}
            assert len(found) == 1
            seen.append(found.pop())
    return seen, cache


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("budget", "prompt", "expected"),
    [
        ("20t", 40, [20, *range(21, 28), *[*range(20, 28)] * 2, 20]),
        ("20t", 14, [*range(14, 28), *range(20, 28), 20, 21, 22]),
        (0.5, 30, [15, *range(16, 23), *[*range(15, 23)] * 2, 15]),
        (1.0, 30, [*range(30, 55)]),
    ],
)
def test_the_sawtooth(model_of, name, budget, prompt, expected):
    assert sizes(model_of("llama"), name, budget, prompt, len(expected) - 1)[0] == expected


@pytest.mark.parametrize("name", METHODS)
def test_a_share_is_taken_anew_at_the_end_of_each_prompt(model_of, name):
    model = model_of("llama")
    _, cache = sizes(model, name, 0.5, 30, 4)
    with torch.no_grad():
        model(tiny.text_ids(16), past_key_values=cache)
        after = [int(layer.lengths().max()) for layer in cache.layers]
        for token in tiny.text_ids(8, seed=1).split(1, 1):
            model(token, past_key_values=cache)
    assert after == [25] * 3 == [int(layer.lengths().max()) for layer in cache.layers]


@pytest.mark.parametrize("name", METHODS)
def test_tokens_that_were_forgotten_make_room(model_of, name):
    """The next round comes when the layer has grown again, and cuts to the same number."""
    model = model_of("llama")
    _, cache = sizes(model, name, 0.5, 30, 4)
    seen = []
    with torch.no_grad():
        cache.forget([[(0, 34)]])
        for token in tiny.text_ids(31, seed=1).split(1, 1):
            model(token, past_key_values=cache)
            seen.append(int(cache.layers[0].lengths().max()))
    assert seen == [*range(1, 23), *range(15, 23), 15]


@pytest.mark.parametrize("name", ["rkv(8)", "tri_attention(8,centres={!r})"])
def test_a_prompt_that_was_read_frozen_has_its_length_for_a_share(model_of, name, tmp_path):
    calibrate(model_of("llama"), tiny.text_ids(40)[0]).save(tmp_path / FILE)
    name = name.format(str(tmp_path))
    model, ids, cache = model_of("llama"), tiny.text_ids(44), MethodCache(model_of("llama"), name, 0.5)
    cache.freeze()
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        cache.freeze(False)
        found = []
        for token in ids[:, 20:].split(1, 1):
            model(token, past_key_values=cache)
            found.append(int(cache.layers[0].lengths().max()))
    assert found == [21, *range(22, 29), *[*range(21, 29)] * 2]


def test_without_a_prompt_s_queries_the_first_round_says_what_is_missing(model_of):
    model, ids, cache = model_of("llama"), tiny.text_ids(40), MethodCache(model_of("llama"), "tri_attention(8)", "20t")
    cache.freeze()
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        cache.freeze(False)
        with pytest.raises(
            ValueError, match="layer 0: centres='prompt' has seen no prompt end in this cache .*calibrat"
        ):
            for token in ids[:, 20:].split(1, 1):
                model(token, past_key_values=cache)


@pytest.mark.parametrize("name", METHODS)
def test_a_loaded_cache_goes_on_with_its_rounds(model_of, name, tmp_path):
    model, more = model_of("llama"), tiny.text_ids(12, seed=1)
    _, cache = sizes(model, name, 0.5, 30, 5)
    cache.save(tmp_path)
    loaded = MethodCache.load(tmp_path, model)
    with torch.no_grad():
        for token in more.split(1, 1):
            ours, theirs = (model(token, past_key_values=x).logits for x in (cache, loaded))
            torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    assert [x.held_positions().tolist() for x in loaded.layers] == [x.held_positions().tolist() for x in cache.layers]


@pytest.mark.parametrize("name", METHODS)
def test_between_rounds_nothing_is_scored(model_of, name, monkeypatch):
    """What a token costs in between: no score, no sort, no look at what is stored."""
    cls, scored = type(resolve_method(name)), []
    score = cls.score

    def noted(self, layer, *args):
        scored.append(layer.seen)
        return score(self, layer, *args)

    monkeypatch.setattr(cls, "score", noted)
    sizes(model_of("llama"), name, "20t", 40, 16)
    assert sorted(set(scored)) == [40, 48, 56]


def test_shares_of_rows_are_marked_on_the_host(model_of):
    _, cache = sizes(model_of("llama"), "rkv", 0.5, 30, 1)
    assert [layer.statistics[BASE].tolist() for layer in cache.layers] == [[[[15]]]] * 3
    _, cache = sizes(model_of("llama"), "rkv", "15t", 30, 1)
    assert BASE not in cache.layers[0].statistics


@pytest.mark.parametrize("name", ["tri_attention(centres='mini',window=16)", "rkv"])
def test_2000_tokens_through_512_slots(name):
    """384 + 128 slots: after the first rounds no token is answered with more bytes than those before it."""
    model, tokenizer = load_mini()
    cache = MethodCache(model, name, "384t")
    ids = torch.from_numpy(make_example("needle", 256, 1_000_000, tokenizer).prompt_ids)[None]
    most, held = 0, []
    with torch.no_grad():
        logits = model(ids, past_key_values=cache).logits
        for _ in range(2000):
            logits = model(logits[:, -1:].argmax(-1), past_key_values=cache).logits
            most = max(most, *(layer.whole for layer in cache.layers))
            held.append(cache.kv_bytes())
    assert bool(logits.isfinite().all()) and cache.get_seq_length() == ids.shape[1] + 2000
    assert most == 384 + 128 - 1
    assert max(held[1000:]) == max(held[500:1000]) < 1.2 * 512 * cache.full_bytes() / cache.get_seq_length()
    assert cache.peak_bytes < 1.2 * 512 * cache.full_bytes() / cache.get_seq_length()
