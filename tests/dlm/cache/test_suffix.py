"""Suffix pruning: with a wide window the policy itself; else fewer queries, and what is pruned cannot be seen."""

from __future__ import annotations

import pytest
import torch

from dlm.cache import resolve_cache
from dlm.decode import decode
from dlm.loop import Loop
from tests.dlm.toys import Rule, dream, llada, prompts

CACHES = ["none", "prefix", "dual", "dual('commit_first')", "freecache", "freecache(0)", "dkv(3)"]


@pytest.mark.parametrize("make", [llada, dream])
@pytest.mark.parametrize("cache", [*CACHES, "freecache+snapkv(0.6)"])
def test_a_window_of_the_answer_prunes_nothing(make, cache):
    model, (ids, mask) = make(), prompts(3, 6, 5)
    for rule in (Rule(threshold=0.35), Rule(run=3)):
        options = dict(gen_length=12, block_length=4, unmask=rule)
        want = decode(model, ids, mask, cache=cache, **options)
        got = decode(model, ids, mask, cache=f"{cache}+suffix(8)", **options)
        assert torch.equal(got.ids, want.ids) and got.stats.query_tokens == want.stats.query_tokens


@pytest.mark.parametrize("make", [llada, dream])
@pytest.mark.parametrize("cache", [*CACHES, "freecache+snapkv(0.6)"])
def test_a_pruned_batch_is_its_rows_alone(make, cache):
    model, lengths = make(), (3, 6, 5)
    ids, mask = prompts(*lengths)
    for rule in (dict(threshold=0.35), dict(run=3)):
        options = dict(gen_length=12, block_length=2, cache=f"{cache}+suffix(3)")
        together = decode(model, ids, mask, unmask=Rule(**rule), **options)
        alone = [decode(model, ids[i : i + 1, 6 - n :], unmask=Rule(**rule), **options) for i, n in enumerate(lengths)]
        assert together.ids.tolist() == [one.ids[0].tolist() for one in alone]
        assert together.stats.query_tokens == sum(one.stats.query_tokens for one in alone)


def test_query_tokens_are_the_closed_form():
    """A full forward computes P + (c + 1) B + min(w, rest) and one more where masks lie behind the window."""
    ids, window, block, gen = prompts(5)[0], 3, 4, 16
    got = decode(llada(), ids, gen_length=gen, block_length=block, cache=f"none+suffix({window})", unmask=Rule(),
                 eos="none")  # fmt: skip
    expected = 0
    for c in range(gen // block):
        rest = gen - (c + 1) * block
        expected += block * (5 + (c + 1) * block + min(window, rest) + (rest > window))
    assert got.stats.query_tokens == expected


@pytest.mark.parametrize("cache", CACHES)
def test_a_pruned_slot_is_neither_computed_nor_seen(cache, monkeypatch):
    model, (ids, _) = llada(), prompts(5)
    checked, forward = [], Loop._forward

    def watched(loop, canvas_ids, positions, rows, plan):
        end = 5 + 4 * (int(loop.canvas.active_cpu[0]) + 1) + 2
        pruned = slice(end, loop.canvas.length - 1)
        seen = torch.ones(1, loop.canvas.length, dtype=torch.bool) if plan.visible is None else plan.visible
        checked.append(not bool(plan.wanted(1, 17, ids.device)[0, pruned].any()))
        # Without anything pruned the plan may leave `visible` out.
        checked.append(end >= 16 or not bool(seen[0, pruned].any()))
        return forward(loop, canvas_ids, positions, rows, plan)

    monkeypatch.setattr(Loop, "_forward", watched)
    decode(model, ids, gen_length=12, block_length=4, cache=f"{cache}+suffix(2)", unmask=Rule(), eos="none")
    assert len(checked) == 24 and all(checked)


def test_expressions_and_what_cannot_be():
    text = "freecache(delay=0)+snapkv(window=8)+suffix(16)"
    assert resolve_cache("freecache(delay=0)+suffix(16)+snapkv(0.3,window=8)").expression == text
    assert resolve_cache("dual+suffix").window == 32
    for cache, message in (
        ("dual+suffix(-1)", "suffix window=-1 is no number of tokens"),
        ("dual+suffix(1)+suffix(2)", "more than one suffix"),
        ("dllm-cache+suffix(4)", "computes whole rows here and cannot leave slots out"),
        ("dual+suffix(width=4)", "its arguments are: window"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(llada(), prompts(5)[0], gen_length=8, block_length=4, cache=cache, unmask=Rule())
