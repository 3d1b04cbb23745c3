"""Rows of a batch: ragged prompts and rows at different speeds get the tokens, and cost the queries, of single runs."""

from __future__ import annotations

import pytest

from dlm.decode import decode
from tests.dlm.toys import Rule, dream, llada, prompts

CACHES = [
    "none", "freecache", "freecache(0)", "freecache(refresh=3)", "prefix", "dual", "dual('commit_first')",
    "dual(refresh=2)", "dkv(3)", "dkv(4,reset_each_block=False)", "dllm-cache(5,3,0.3)", "freecache+snapkv(0.6)",
]  # fmt: skip
RULES = {"quota": dict(), "threshold": dict(threshold=0.35), "run": dict(run=3)}


def generate(model, ids, mask, cache, rule, **options):
    options = {"gen_length": 12, "block_length": 4, "eos": "stop", **options}
    return decode(model, ids, mask, cache=cache, unmask=Rule(**rule), **options)


@pytest.mark.parametrize("make", [llada, dream])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cache", CACHES)
def test_a_batch_is_its_rows_alone(make, rule, cache):
    model, lengths = make(), (3, 6, 5)
    ids, mask = prompts(*lengths)
    together = generate(model, ids, mask, cache, RULES[rule])
    alone = [
        generate(model, ids[row : row + 1, 6 - length :], None, cache, RULES[rule])
        for row, length in enumerate(lengths)
    ]
    assert together.ids.tolist() == [one.ids[0].tolist() for one in alone]
    assert together.stats.query_tokens == sum(one.stats.query_tokens for one in alone)
    assert together.stats.forwards == max(one.stats.forwards for one in alone)
    assert together.stats.committed == [one.stats.committed[0] for one in alone]


def test_rows_really_differ_in_speed():
    model, (ids, mask) = llada(), prompts(3, 6, 5)
    alone = [generate(model, ids[i : i + 1], mask[i : i + 1], "none", RULES["threshold"]) for i in range(3)]
    assert len({one.stats.forwards for one in alone}) > 1


@pytest.mark.parametrize("make", [llada, dream])
@pytest.mark.parametrize("cache", CACHES)
def test_guidance_of_a_ragged_batch(make, cache):
    model = make()
    ids, mask = prompts(3, 6)
    together = generate(model, ids, mask, cache, RULES["threshold"], cfg_scale=0.7)
    alone = [generate(model, x, None, cache, RULES["threshold"], cfg_scale=0.7) for x in (ids[:1, 3:], ids[1:])]
    assert together.ids.tolist() == [one.ids[0].tolist() for one in alone]
    assert together.stats.query_tokens == sum(one.stats.query_tokens for one in alone)
