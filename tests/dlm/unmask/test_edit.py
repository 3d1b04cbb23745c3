"""Token editing: LLaDA2.1's sampler on a LLaDA2 of random weights, and what it equals where it edits nothing."""

from __future__ import annotations

import pytest
import torch

from dlm.decode import decode
from dlm.models import load_model
from dlm.prompts import pad_left
from tests.dlm.models import slow_blocks as slow
from tests.dlm.models.checkpoints import write
from tests.dlm.toys import END, dream, llada, prompts

PROMPTS = [[5, 9, 33], list(range(40, 4, -1))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit")
    return load_model(write(folder, slow.CONFIGS["llada2"], slow.random_state("llada2")))[0]


@pytest.mark.parametrize(("tau", "edit", "rounds"), [(0.3, 0.25, 3), (0.2, 0.0, 4), (0.4, 0.3, 0)])
def test_tokens_and_forwards_are_those_of_the_sampler_without_a_cache(model, tau, edit, rounds):
    def forward(x):
        with torch.no_grad():
            return model(torch.tensor([x])).logits[0]

    options = dict(gen_length=40, eos="none", unmask=f"edit({tau},{edit},{rounds})")
    wanted = [slow.edited(forward, prompt, 40, 32, tau, edit, rounds) for prompt in PROMPTS]
    for cache in ("block", "none"):
        for prompt, (want, forwards) in zip(PROMPTS, wanted, strict=True):
            got = decode(model, torch.tensor([prompt]), cache=cache, **options)
            assert got.ids[0].tolist() == want and got.stats.forwards == forwards, cache
            assert got.stats.extra["edited"] > 0
    # Rows at their own pace, the one of them still editing when the other has gone on.
    got = decode(model, *pad_left(PROMPTS, 61), **options)
    assert got.ids.tolist() == [want for want, _ in wanted]


@pytest.mark.parametrize("make", [llada, dream])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "freecache", "freecache(0)", "dual+suffix(3)"])
def test_without_edits_it_is_threshold(make, cache):
    model, (ids, mask) = make(), prompts(3, 9, 5)
    options = dict(gen_length=12, block_length=4, cache=cache)
    want = decode(model, ids, mask, unmask="threshold(0.35)", **options)
    got = decode(model, ids, mask, unmask="edit(0.35,2,0)", **options)
    assert torch.equal(got.ids, want.ids) and got.stats.forwards == want.stats.forwards
    if cache == "freecache(0)":
        return  # what is frozen is then newer
    # One further look at every block, which finds nothing.
    once = decode(model, ids, mask, unmask="edit(0.35,2)", **options)
    assert torch.equal(once.ids, want.ids)
    assert [once.stats.row_forwards, once.stats.committed] == [want.stats.row_forwards + 9, want.stats.committed]


@pytest.mark.parametrize("make", [llada, dream])
@pytest.mark.parametrize("cache", ["none", "dual", "freecache"])
def test_a_batch_is_its_rows_alone_and_counts_masks(make, cache):
    model, lengths = make(), (3, 9, 5)
    model.get_output_embeddings().weight.data[END] += 0.1
    ids, mask = prompts(*lengths)
    for eos in ("stop", "fill", "none"):
        options = dict(gen_length=12, block_length=4, cache=cache, eos=eos, unmask="edit(0.3,0.1,5)")
        together = decode(model, ids, mask, **options)
        alone = [decode(model, ids[i : i + 1, 9 - n :], **options) for i, n in enumerate(lengths)]
        assert together.ids.tolist() == [one.ids[0].tolist() for one in alone]
        assert together.stats.query_tokens == sum(one.stats.query_tokens for one in alone)
        assert all(0 < n <= 12 for n in together.stats.committed) and together.stats.extra["edited"] > 0


def test_given_text_is_never_edited():
    model, (ids, mask) = llada(), prompts(9, 9)
    ids[:, 3:5] = model.decoding_spec.mask_id
    got = decode(model, ids, mask, gen_length=0, block_length=9, cache="none", unmask="edit(0,0)")
    assert torch.equal(got.ids[:, :3], ids[:, :3]) and torch.equal(got.ids[:, 5:], ids[:, 5:])


def test_a_cache_that_does_not_compute_written_slots_is_refused():
    with pytest.raises(ValueError, match="cache dkv does not compute them"):
        decode(llada(), prompts(5)[0], gen_length=8, cache="dkv", unmask="edit")
    with pytest.raises(ValueError, match="rounds=-1 is not in"):
        decode(llada(), prompts(5)[0], gen_length=8, unmask="edit(rounds=-1)")
