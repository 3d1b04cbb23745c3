"""Infilling: masks anywhere, given text untouched, rows of different gaps as they are alone."""

from __future__ import annotations

import pytest
import torch

from dlm.decode import decode
from dlm.prompts import pad_left
from tests.dlm.toys import END, MASK, PAD, dream, llada, prompts

CACHES = [
    "none", "prefix", "dual", "dual('commit_first')", "freecache", "dkv", "freecache+full", "freecache+snapkv(0.5)",
    "dual+suffix(3)", "dllm-cache(4,3,0.4)",
]  # fmt: skip


def gaps() -> tuple[torch.Tensor, torch.Tensor]:
    """Gaps in the middle, at two places, and at the very end."""
    ids, mask = prompts(3, 9, 5)
    for row, column in ((0, -2), (1, 2), (1, 3), (1, 7), (2, -1)):
        ids[row, column] = MASK
    return ids, mask


@pytest.mark.parametrize("make", [llada, dream])
@pytest.mark.parametrize("cache", CACHES)
def test_given_text_stays_and_rows_are_those_alone(make, cache):
    model, (ids, mask) = make(), gaps()
    given = (ids != MASK) & mask.bool()
    for more, block in ((0, 4), (6, 4), (0, None)):
        options = dict(gen_length=more, infill=True, block_length=block, cache=cache, unmask="confidence")
        got = decode(model, ids, mask, **options)
        assert got.ids.shape == (3, 9 + more) and not bool((got.ids == MASK).any())
        assert torch.equal(got.ids[:, :9][given], ids[given])
        for row, length in enumerate((3, 9, 5)):
            alone = decode(model, ids[row : row + 1, 9 - length :], **options)
            assert torch.equal(alone.ids[0], got.ids[row, 9 - length :])


def rows(*texts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the left, and their mask."""
    return pad_left(texts, PAD)


GAPPED = {
    "a short gap beside a long one": ([5, *[MASK] * 20], [3, 20, MASK], [2, 18, 13, 14, 9, 20, 7, 17, *[MASK] * 4]),
    "text behind": (
        [7, MASK],
        [17, 19, 10, 5, 18, 16, 14],
        [14, 16, 9, 4, MASK, MASK, 3],
        [12, 9, MASK, MASK, 2, MASK],
    ),
    "at the beginning": ([MASK, MASK, 0, MASK, MASK, 13, 8], [5, *[MASK] * 20]),
}


@pytest.mark.parametrize("gap", GAPPED)
@pytest.mark.parametrize(
    ("make", "cache", "rule"),
    [
        (llada, "freecache+snapkv(0.5)", "confidence"),
        (dream, "freecache+snapkv(0.5)", "threshold(0.3)"),
        (dream, "freecache(0)+adakv(0.5)", "confidence"),
        (dream, "dual('commit_first')", "entropy(compat=True)"),
        (dream, "prefix('commit_first')", "threshold(0)"),
        (llada, "freecache(0)", "wino(0.2,0.3)"),
        (llada, "dual", "wino(0.2,0.3)"),
    ],
)
def test_other_rows_gaps_change_neither_tokens_nor_costs(make, cache, rule, gap):
    """A row's gap may make the block longer for all: what is looked at and computed of the others stays."""
    texts = GAPPED[gap]
    if make is dream and texts[0][0] == MASK:
        return  # refused, see below
    model, (ids, mask) = make(), rows(*texts)
    more = 0 if all(MASK in text for text in texts) else 3
    for block in (None, 5):
        options = dict(gen_length=more, infill=True, block_length=block, cache=cache, unmask=rule, eos="none")
        got = decode(model, ids, mask, **options)
        alone = [decode(model, torch.tensor([text]), **options) for text in texts]
        for row, (text, one) in enumerate(zip(texts, alone, strict=True)):
            assert got.ids[row, ids.shape[1] - len(text) :].tolist() == one.ids[0].tolist()
        assert got.stats.query_tokens == sum(one.stats.query_tokens for one in alone)
        assert got.stats.committed == [one.stats.committed[0] for one in alone]


def test_no_text_at_all_is_generation():
    ids = torch.zeros(1, 0, dtype=torch.int64)
    got = decode(llada(), ids, gen_length=6, infill=True)
    assert got.ids.shape == (1, 6) and MASK not in got.ids


COMPAT = ["origin", "maskgit_plus", "topk_margin", "entropy"]


@pytest.mark.parametrize("cache", ["none", "dual", "freecache(0)", "dllm-cache(4,3,0.4)"])
@pytest.mark.parametrize("rule", [f"{name}(compat=True)" for name in COMPAT] + ["origin", "confidence"])
def test_every_row_has_the_schedule_that_it_has_alone(rule, cache):
    model, (ids, mask) = llada(), gaps()

    def run(ids, mask, seeds, **more):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return decode(model, ids, mask, infill=True, cache=cache, unmask=rule, generator=generators, eos="none", **more)

    for more in (dict(gen_length=6, block_length=4), dict(gen_length=6, block_length=None),
                 dict(gen_length=8, block_length=5, steps=4)):  # fmt: skip
        got = run(ids, mask, range(3), **more)
        alone = [run(ids[row : row + 1, 9 - n :], None, [row], **more) for row, n in enumerate((3, 9, 5))]
        assert [got.ids[row, 9 - n :].tolist() for row, n in enumerate((3, 9, 5))] == [a.ids[0].tolist() for a in alone]
        assert got.stats.query_tokens == sum(one.stats.query_tokens for one in alone)


@pytest.mark.parametrize("cache", CACHES)
def test_a_row_of_nothing_but_masks_differs_from_itself_alone_by_ties_only(cache):
    """To its model all its slots are alike, so rounding chooses between them; told apart, they are those alone."""
    model, (ids, mask) = llada(), prompts(3, 9, 5)
    ids[0, 6:] = ids[2, 4:] = MASK
    logits = model.double()(ids[:1, 6:]).logits[0]
    assert torch.allclose(logits, logits[:1].expand_as(logits), atol=1e-12)
    model.float()
    place = torch.randn(32, 24, generator=torch.Generator().manual_seed(0))

    def hook(canvas, slots, logits):
        return logits + place[canvas.position_ids.gather(1, slots.clamp(min=0))]

    options = dict(gen_length=0, block_length=4, cache=cache, unmask="entropy(compat=True)", logits_hook=hook)
    ids[1, 4] = MASK
    got = decode(model, ids, mask, **options)
    for row, n in enumerate((3, 9, 5)):
        assert got.ids[row, 9 - n :].tolist() == decode(model, ids[row : row + 1, 9 - n :], **options).ids[0].tolist()


def test_steps_are_shared_by_the_masks_of_a_block():
    ids, _ = prompts(9)
    ids[0, 2] = ids[0, 6] = MASK
    # Nine tokens in three steps: one for each block of one mask, and what is left for the last one of seven.
    got = decode(llada(), ids, gen_length=7, infill=True, block_length=4, steps=4, cache="none", unmask="confidence")
    assert got.stats.forwards == 4 and got.stats.committed == [9]


@pytest.mark.parametrize("cache", ["prefix(refresh=1)", "dual(refresh=1)", "freecache(refresh=1)", "dkv(1)"])
def test_a_cache_that_is_always_fresh_is_none(cache):
    model, (ids, mask) = llada(), gaps()
    options = dict(gen_length=0, block_length=4, unmask="threshold(0.3)")
    assert torch.equal(decode(model, ids, mask, cache=cache, **options).ids,
                       decode(model, ids, mask, cache="none", **options).ids)  # fmt: skip


def test_masks_behind_a_prompt_are_generation():
    model, (ids, mask) = llada(), prompts(3, 9, 5)
    masked = torch.cat([ids, ids.new_full((3, 8), MASK)], 1)
    options = dict(block_length=4, cache="dual", unmask="threshold(0.4)")
    got = decode(model, masked, torch.cat([mask, torch.ones(3, 8)], 1), gen_length=0, **options)
    want = decode(model, ids, mask, gen_length=8, **options)
    assert torch.equal(got.ids[:, 9:], want.ids) and got.stats.forwards == want.stats.forwards


def test_an_end_of_text_in_a_gap_leaves_what_follows():
    model, (ids, _) = llada(), prompts(6)
    ids[0, 2] = MASK
    model.head.weight.data[END] += 3.0
    for eos in ("stop", "fill"):
        got = decode(model, ids, gen_length=4, infill=True, block_length=2, cache="none", unmask="confidence", eos=eos)
        assert torch.equal(got.ids[0, 3:6], ids[0, 3:6])


@pytest.mark.parametrize(
    ("edit", "options", "message"),
    [
        ((), dict(gen_length=0), r"gen_length=0 fills the masks \(token 23\) of the input, and a row has none"),
        ((3,), dict(gen_length=4), "use infill=True to have it written"),
        ((0,), dict(gen_length=0, model=dream), "an input begins with a mask, and this model predicts each token"),
        ((3,), dict(gen_length=-1), "gen_length=-1 is no number of tokens"),
    ],
)
def test_what_cannot_be(edit, options, message):
    ids = prompts(6)[0]
    ids[0, list(edit)] = MASK
    make = options.pop("model", llada)
    with pytest.raises(ValueError, match=message):
        decode(make(), ids, **options)
