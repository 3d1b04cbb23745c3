"""WINO against a slow loop over one row, and what it equals where it takes nothing back."""

from __future__ import annotations

import pytest
import torch

from dlm.decode import decode
from dlm.models import load_model
from dlm.models.backbone import full_tables, rope_tables
from dlm.prompts import pad_left
from tests.dlm.models import slow_blocks
from tests.dlm.models.checkpoints import write
from tests.dlm.toys import MASK, dream, llada, prompts


def forward(model, ids: list[int], start: int, block: int) -> torch.Tensor:
    """Probabilities [L + block, V]: the canvas, and the shadows of the block that begins at `start`."""
    n = len(ids)
    places = list(range(n)) + list(range(start, start + block))
    rope = full_tables(rope_tables(torch.tensor([places]), model.rotated, model.config.rope_theta))
    seen = torch.zeros(n + block, n + block, dtype=torch.bool)
    seen[:, :n] = True
    for i in range(block):
        seen[n + i, start + i] = False
        seen[n + i, n:] = True
    hidden = model.embed(torch.tensor([ids + [MASK] * block]))
    for layer in model.layers:
        hidden = layer(hidden, rope, attention_mask=seen[None])
    z = model.head(model.final_norm(hidden))[0].float()
    z[:, MASK] = -torch.inf
    return z.softmax(-1)


def slow(model, prompt: list[int], gen: int, block: int, draft: float, check: float) -> tuple[list[int], int, int]:
    """(text, forwards, tokens taken back)."""
    ids, forwards, revoked = prompt + [MASK] * gen, 0, 0
    for start in range(len(prompt), len(prompt) + gen, block):
        bound = 30
        while any(ids[i] == MASK for i in range(start, start + block)):
            p = forward(model, ids, start, block)
            forwards += 1
            masks = sorted((i for i in range(start, start + block) if ids[i] == MASK), key=lambda i: -float(p[i].max()))
            most = max(5, min(20, int(0.7 * len(masks))))
            drafts = [i for i in masks[:most] if float(p[i].max()) > draft] or masks[:1]
            doubts = []
            if len(drafts) > 1:
                own = {i: float(p[len(ids) + i - start, ids[i]]) for i in range(start, start + block) if i not in masks}
                doubts = sorted((i for i in own if own[i] < check), key=own.get)[: bound - 1]
            for i in drafts:
                ids[i] = int(p[i].argmax())
            for i in doubts:
                ids[i] = MASK
            bound, revoked = len(drafts), revoked + len(doubts)
    return ids[len(prompt) :], forwards, revoked


@pytest.mark.parametrize(("block", "check"), [(12, 0.9), (6, 0.6), (4, 0.0)])
@torch.no_grad()
def test_it_is_the_slow_loop(block, check):
    model, ids = llada(3), prompts(5)[0]
    want, forwards, revoked = slow(model, ids[0].tolist(), 12, block, 0.25, check)
    got = decode(model, ids, gen_length=12, block_length=block, cache="none", eos="none", unmask=f"wino(0.25,{check})")
    assert got.ids[0].tolist() == want and got.stats.forwards == forwards
    assert got.stats.extra == {"revoked": revoked} and (revoked > 0) == (check > 0)
    assert got.stats.committed == [12] and got.stats.query_tokens == forwards * (17 + block)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "freecache", "dual+suffix(3)"])
def test_without_revocation_it_is_threshold_and_a_batch_is_its_rows(cache):
    model, lengths = llada(), (3, 9, 5)
    ids, mask = prompts(*lengths)
    options = dict(gen_length=12, block_length=4, cache=cache)
    want = decode(model, ids, mask, unmask="threshold(0.35)", **options)
    got = decode(model, ids, mask, unmask="wino(0.35,0)", **options)
    assert torch.equal(got.ids, want.ids) and got.stats.forwards == want.stats.forwards
    options |= dict(unmask="wino(0.25,0.5)", block_length=6)
    together = decode(model, ids, mask, **options)
    alone = [decode(model, ids[i : i + 1, 9 - n :], **options) for i, n in enumerate(lengths)]
    assert together.ids.tolist() == [one.ids[0].tolist() for one in alone]
    assert together.stats.query_tokens == sum(one.stats.query_tokens for one in alone)
    assert together.stats.extra["revoked"] == sum(one.stats.extra["revoked"] for one in alone)


def test_on_a_block_causal_model_the_exact_caches_agree(tmp_path):
    config = slow_blocks.CONFIGS["sdar"] | {"block_size": 16}
    model, _ = load_model(write(tmp_path, config, slow_blocks.random_state("sdar")))
    ids, mask = pad_left([[4, 9, 33], list(range(40, 29, -1))], 61)
    model.lm_head.weight.data *= 3  # surer, so that several are drafted at once
    options = dict(gen_length=24, unmask="wino(0.15,0.95)", eos="none")
    want = decode(model, ids, mask, cache="none", **options)
    assert want.stats.extra["revoked"] > 0
    for cache in ("block", "block(fold=False)", "dual", "freecache"):
        assert torch.equal(decode(model, ids, mask, cache=cache, **options).ids, want.ids), cache


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (llada, dict(cache="dkv"), "cache dkv: a block's slots must be computed and read together"),
        (llada, dict(cache="none", cfg_scale=1.0), "guided logits have no shadows"),
        (dream, dict(cache="none"), "needs a model whose rows predict their own slots"),
    ],
)
def test_what_shadows_cannot_stand_beside_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        decode(make(), prompts(5)[0], gen_length=8, block_length=4, unmask="wino", **options)
