"""Block-causal models: rows of different lengths, gaps, and methods of textkv for finished blocks."""

from __future__ import annotations

import pytest
import torch

from dlm.decode import decode, stream
from dlm.models import load_model
from dlm.prompts import pad_left
from tests.dlm.models import slow_blocks as slow
from tests.dlm.models.checkpoints import write

FAMILIES = ["sdar", "fast_dllm", "llada2"]
CACHES = ["none", "block", "block(fold=False)", "freecache", "freecache(0)", "prefix", "dual", "dkv(3)",
          "block+suffix(0)", "block+snapkv(0.5)", "freecache+snapkv(0.5)"]  # fmt: skip
LENGTHS = (3, 18, 11)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    return {f: load_model(write(root / f, slow.CONFIGS[f], slow.random_state(f)))[0] for f in FAMILIES}


def rows(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 60, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize(
    ("family", "cache"),
    [(f, c) for f in ("sdar", "fast_dllm") for c in CACHES] + [("llada2", "none"), ("llada2", "block")],
)
def test_a_ragged_batch_is_its_rows_alone(models, family, cache):
    model, prompts = models[family], rows(*LENGTHS)
    for more in (dict(unmask="threshold(0.3)"), dict(unmask="confidence", steps=5, eos="none"),
                 dict(unmask="confidence", cfg_scale=0.5)):  # fmt: skip
        options = dict(gen_length=10, cache=cache) | more
        together = decode(model, *pad_left(prompts, 61), **options)
        alone = [decode(model, torch.tensor([row]), **options) for row in prompts]
        assert together.ids.tolist() == [one.ids[0].tolist() for one in alone]
        assert together.stats.query_tokens == sum(one.stats.query_tokens for one in alone)
        assert together.stats.forwards == max(one.stats.forwards for one in alone)
        assert together.stats.committed == [one.stats.committed[0] for one in alone]
        assert together.stats.text_tokens == [one.stats.text_tokens[0] for one in alone]


def test_a_prompt_within_its_first_block_and_a_long_one(models):
    model, prompts = models["sdar"], rows(1, 9)
    options = dict(gen_length=6, unmask="threshold(0.3)")
    together = decode(model, *pad_left(prompts, 61), **options)
    alone = [decode(model, torch.tensor([row]), **options).ids[0].tolist() for row in prompts]
    assert together.ids.tolist() == alone


@pytest.mark.parametrize("family", ["sdar", "fast_dllm"])
@pytest.mark.parametrize("cache", ["none", "block", "dual"])
def test_ssd_is_one_token_per_forward(models, family, cache):
    for lengths in ((18,), LENGTHS):
        ids, mask = pad_left(rows(*lengths), 61)
        plain, quick = (decode(models[family], ids, mask, gen_length=18, cache=cache, unmask=unmask)
                        for unmask in ("confidence", "ssd(3)"))  # fmt: skip
        assert torch.equal(plain.ids, quick.ids) and quick.stats.forwards < plain.stats.forwards


def test_a_stream_of_a_ragged_batch_is_its_answers(models):
    model, (ids, mask) = models["sdar"], pad_left(rows(*LENGTHS), 61)
    options = dict(gen_length=10, unmask="threshold(0.3)", eos="none")
    given: dict[int, list[int]] = {}
    closed = []
    for piece in stream(model, ids, mask, **options):
        assert piece.row not in closed  # also while what fills the last block is written
        given.setdefault(piece.row, []).extend(piece.ids.tolist())
        closed += [piece.row] * piece.done
    assert sorted(closed) == [0, 1, 2]
    want = decode(model, ids, mask, **options).ids.tolist()
    # An end of text ends what a stream gives out.
    assert [given[row] for row in range(3)] == [row[: row.index(61)] if 61 in row else row for row in want]


def gaps() -> tuple[torch.Tensor, torch.Tensor]:
    """In one block and over two, at a prompt's end, and several."""
    prompts = rows(6, 19, 11, 9)
    for row, columns in enumerate(((2,), (3, 4, 5, 17), (10,), (1, 6, 7))):
        for column in columns:
            prompts[row][column] = 60
    return pad_left(prompts, 61)


@pytest.mark.parametrize(
    ("family", "cache"),
    [(f, c) for f in ("sdar", "fast_dllm") for c in ("none", "block", "freecache", "dual", "dkv(3)")]
    + [("llada2", "block")],
)
def test_gaps_are_filled_and_rows_are_those_alone(models, family, cache):
    model, (ids, mask) = models[family], gaps()
    given = (ids != 60) & mask.bool()
    for more in (0, 5):
        options = dict(gen_length=more, infill=True, cache=cache, unmask="threshold(0.3)", eos="none")
        got = decode(model, ids, mask, **options)
        assert got.ids.shape == (4, 19 + more) and not bool((got.ids == 60).any())
        assert torch.equal(got.ids[:, :19][given], ids[given])
        needed = 0
        for row, length in enumerate((6, 19, 11, 9)):
            alone = decode(model, ids[row : row + 1, 19 - length :], **options)
            needed += alone.stats.query_tokens
            assert torch.equal(alone.ids[0], got.ids[row, 19 - length :])
        assert got.stats.query_tokens == needed


def test_the_exact_caches_fill_gaps_as_none_does(models):
    ids, mask = gaps()
    for model in (models["sdar"], models["fast_dllm"]):
        options = dict(gen_length=0, unmask="confidence", eos="none")
        want = decode(model, ids, mask, cache="none", **options)
        for cache in ("block", "block(fold=False)", "freecache", "prefix", "dual"):
            assert torch.equal(decode(model, ids, mask, cache=cache, **options).ids, want.ids), cache


def test_a_gap_sees_its_own_block_and_no_later_one(models):
    ids = torch.tensor(rows(16))
    ids[0, 5] = 60
    first = decode(models["sdar"], ids, gen_length=0).ids
    for changed, same in ((7, False), (8, True)):
        filled = set()
        for token in range(0, 60, 4):
            other = ids.clone()
            other[0, changed] = token
            filled.add(int(decode(models["sdar"], other, gen_length=0).ids[0, 5]))
        assert (filled == {int(first[0, 5])}) == same
    # Only the gap's block is written: nothing behind the text, which ends within a block.
    assert decode(models["sdar"], ids[:, :15], gen_length=0).stats.committed == [1]


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_behind_a_prompt_are_generation(models, family):
    model, (ids, mask) = models[family], pad_left(rows(*LENGTHS), 61)
    masked = torch.cat([ids, ids.new_full((3, 8), 60)], 1)
    options = dict(cache="block", unmask="threshold(0.3)")
    got = decode(model, masked, torch.cat([mask, torch.ones(3, 8)], 1), gen_length=0, **options)
    want = decode(model, ids, mask, gen_length=8, **options)
    assert torch.equal(got.ids[:, 18:], want.ids) and got.stats.forwards == want.stats.forwards


@pytest.mark.parametrize(
    ("family", "cache"),
    [
        ("sdar", "block"),
        ("fast_dllm", "block"),
        ("fast_dllm", "block(fold=False)"),
        ("sdar", "freecache"),
        ("llada2", "block"),
    ],
)
def test_a_method_that_keeps_everything_changes_nothing(models, family, cache):
    model, (ids, mask) = models[family], pad_left(rows(40, 33), 61)
    options = dict(gen_length=16, unmask="threshold(0.3)", eos="none")
    want, got = (decode(model, ids, mask, cache=c, **options) for c in (cache, f"{cache}+full"))
    assert torch.equal(got.ids, want.ids) and got.stats.query_tokens == want.stats.query_tokens
    fewer = decode(model, ids, mask, cache=f"{cache}+snapkv(0.25)", **options)
    assert fewer.stats.cache_bytes < 0.8 * want.stats.cache_bytes
