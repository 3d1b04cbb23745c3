"""ssd writes the tokens of one-token-a-forward decoding, in fewer forwards; klass between its two limits."""

from __future__ import annotations

import pytest
import torch

from dlm.canvas import Canvas
from dlm.decode import decode
from dlm.models import DecodingSpec
from dlm.nodes import lattice
from dlm.unmask import resolve_unmask
from tests.dlm.test_decode import Script
from tests.dlm.toys import END, MASK, dream, llada, prompts

CACHES = ["none", "prefix", "dual", "freecache", "freecache(0)", "dual+suffix(3)"]


@pytest.mark.parametrize("make", [llada, dream])
@pytest.mark.parametrize("cache", CACHES)
def test_tokens_are_those_of_one_token_per_forward(make, cache):
    model, (ids, mask) = make(), prompts(3, 9, 5)
    # Ends of text in the middle of a block and of its guesses.
    model.get_output_embeddings().weight.data[END] += 0.15
    fewer = 0
    for block, eos in ((4, "stop"), (12, "fill"), (5, "none"), (1, "stop")):
        options = dict(gen_length=12, block_length=block, cache=cache, eos=eos)
        want = decode(model, ids, mask, unmask="confidence", **options)
        for rule in ("ssd(1)", "ssd(8)", "ssd(4,early=0)", "ssd(8,early=3)"):
            got = decode(model, ids, mask, unmask=rule, **options)
            assert torch.equal(got.ids, want.ids) and got.stats.committed == want.stats.committed
            assert got.stats.forwards <= want.stats.forwards
            fewer += want.stats.forwards - got.stats.forwards
    assert fewer > 0


def test_a_model_that_always_agrees_writes_n_and_one_more():
    """Eight slots: one token from the first forward, then five and two."""
    ids = torch.zeros(1, 3, dtype=torch.int64)
    model = Script([1, 2, 3, 4, 5, 6, 7, 8])
    model.config = None
    got = decode(Nodes(model), ids, gen_length=8, block_length=8, cache="dual", unmask="ssd(4)")
    assert got.ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]] and got.stats.forwards == 3
    # Verified: four guesses, then the two that were left beside the slot that the forward itself writes.
    assert got.stats.extra == {"drafted": 6, "accepted": 6 - 1}


def test_sets_of_guesses_and_the_ways_between_them():
    holds, more = lattice(3, 1)
    sets = [tuple(row.nonzero()[:, 0].tolist()) for row in holds]
    assert sets == [(), (0,), (0, 1), (0, 1, 2), (1,), (0, 2)]
    # From nothing to the first guess or the second, from the second alone to both; the third alone is not there.
    assert more.tolist() == [[1, 4, -1], [-1, 2, 5], [-1, -1, 3], [-1, -1, -1], [2, -1, -1], [-1, 3, -1]]
    assert [len(lattice(4, early)[0]) for early in (0, 1, 2, 9)] == [5, 8, 10, 11]


def test_a_guess_that_overtakes_its_neighbour_ends_the_walk_only_without_early():
    model, ids = llada(), prompts(5)[0]
    options = dict(gen_length=16, block_length=16, cache="none", eos="none")
    want = decode(model, ids, unmask="confidence", **options)
    chain, wide = (decode(model, ids, unmask=f"ssd(8,early={early})", **options) for early in (0, 2))
    assert torch.equal(chain.ids, want.ids) and torch.equal(wide.ids, want.ids)
    assert wide.stats.forwards < chain.stats.forwards < want.stats.forwards


class Nodes:
    """A scripted model that takes packed rows: all of them are row 0."""

    def __init__(self, script: Script) -> None:
        self.script, self.decoding_spec = script, script.decoding_spec

    def __call__(self, input_ids, **rest):
        return self.script(torch.zeros_like(input_ids), **rest)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(cache="dkv"), "cache dkv changes what is stored within a block"),
        (dict(cache="freecache(refresh=3)"), "changes what is stored within a block"),
        (dict(cache="freecache+snapkv(0.5)"), "changes what is stored within a block"),
        (dict(temperature=0.5), "temperature=0.5: only the most probable tokens can be guessed"),
        (dict(cfg_scale=1.0), "guided logits are not verified"),
        (dict(steps=3), "leave steps out"),
        (dict(logits_hook=lambda canvas, slots, logits: logits), "logits_hook sees one canvas"),
    ],
)
def test_what_the_guarantee_does_not_cover_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        decode(llada(), prompts(5)[0], gen_length=12, block_length=4, unmask="ssd", **options)
    with pytest.raises(ValueError, match="n=0 is no number of guesses"):
        resolve_unmask("ssd(0)")
    with pytest.raises(ValueError, match="early=-1 is no number of places; use 0"):
        resolve_unmask("ssd(early=-1)")


@pytest.mark.parametrize("cache", ["none", "dual", "freecache"])
def test_klass_without_divergence_is_confidence_and_without_a_limit_threshold(cache):
    model, (ids, mask) = llada(), prompts(3, 9, 5)
    options = dict(gen_length=12, block_length=4, cache=cache)
    for steps in (12, 6):
        plain = decode(model, ids, mask, unmask="confidence", steps=steps, **options)
        assert torch.equal(decode(model, ids, mask, unmask="klass(kl=0)", steps=steps, **options).ids, plain.ids)
    # In a block's first forward there is nothing to compare with: one token, then as many as are sure.
    quick = decode(model, ids, mask, unmask="klass(0.2,kl=1e9)", **options)
    assert 2 * 3 <= quick.stats.forwards < 12
    assert torch.equal(quick.ids, decode(model, ids, mask, unmask="klass(0.2,1e9)", **options).ids)


def test_klass_divergence_is_that_of_the_two_forwards():
    model, (ids, _) = llada(), prompts(5)
    rule, seen = resolve_unmask("klass(0.0,kl=0.05)"), []

    def look(canvas, slots, logits):
        seen.append((slots.clone(), logits.clone(), canvas.active_cpu.clone()))
        return logits

    sizes = []
    decode(model, ids, gen_length=8, block_length=8, cache="none", unmask=rule, logits_hook=look, eos="none",
           on_step=lambda canvas, stats: sizes.append(stats.committed[0]))  # fmt: skip
    for t in range(1, len(seen)):
        (slots, logits, _), (_, before, _) = seen[t], seen[t - 1]
        p, q = (x.double().index_fill(2, torch.tensor(23), -torch.inf).softmax(2) for x in (logits, before))
        moved = (p * ((p + 1e-12).log() - (q + 1e-12).log())).sum(2)
        ready = int(((moved < 0.05) & (slots >= 0)).sum())
        assert sizes[t] - sizes[t - 1] == max(1, ready)


def test_klass_compares_a_mask_with_its_own_distribution_alone():
    """A cache with a window gives a mask's logits only from some forward on; before, something else stood there."""
    canvas = Canvas(torch.zeros(1, 1, dtype=torch.int64), gen_length=4, block_length=4, mask_id=MASK, shift=0)
    spec = DecodingSpec(MASK, (END,), END, 0, 256, "confidence")
    unmasker = resolve_unmask("klass(0.0,kl=1e9)").begin(canvas, spec, None, 4)
    logits = torch.arange(24.0).roll(1)[None, None].expand(1, 4, -1)
    assert unmasker.choose(logits, torch.tensor([[1, 2, -1, -1]]), canvas).commit.tolist() == [[True] + [False] * 3]
    # Only slot 2 has a forward behind it.
    second = unmasker.choose(logits, torch.tensor([[-1, 2, 3, 4]]), canvas)
    assert second.commit.tolist() == [[False, True, False, False]]
