"""Where the trainer shows heads to rest: which tokens count as idle, what the loss says, and that it works."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.compare import mismatch
from textkv.mini.filler import sentences
from textkv.mini.words import KEYS, NUMBERS, THINGS, VALUES
from training.text import evaluate
from training.text.feed import Feed
from training.text.hints import looks
from training.text.shape import fresh_model
from training.text.sinks import ENOUGH, LAYERS, MOST, sink_loss, sink_mass
from training.text.tokenizer import build_tokenizer
from training.text.train import TextSettings


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(" " + " ".join(words) for words in sentences(2000, seed=0))


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    return fresh_model(tokenizer)


def test_idle_tokens_are_filler_that_the_model_reads(tokenizer):
    batch = Feed(tokenizer, tokens=4096, seed=1).batch(np.random.default_rng(0), 256)
    rows, tokens = batch.idle.unbind(1)
    assert len(batch.idle) == MOST and tokens.min() >= 1 and tokens.max() < 255
    assert not bool(batch.asks[rows, tokens].any())
    named = {word for words in (KEYS, VALUES, NUMBERS, THINGS) for word in words}
    read = {tokenizer.decode([n]).strip() for n in batch.ids[rows, tokens].tolist()}
    assert read and not read & named
    assert {"question", "code", "list"}.isdisjoint(read)


def test_looks_are_the_models_own_attention(model):
    ids = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(3))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(ids, use_cache=False, output_hidden_states=True, output_attentions=True)
        rows, queries = torch.tensor([0, 1, 1]), torch.tensor([23, 7, 0])
        for number, truth in enumerate(out.attentions):
            seen = looks(model, out.hidden_states[number], number, rows, queries, groups=2).exp()
            assert not mismatch(seen, truth[rows, :, queries], atol=1e-5, rtol=1e-5)
    assert not mismatch(sink_mass(model, ids), torch.stack([a[:, :, 12:, 0].mean((0, 2)) for a in out.attentions]))


def test_the_loss_asks_for_enough_and_no_more(model):
    ids = torch.randint(0, 200, (1, 16))
    with torch.no_grad():
        hidden = model(ids, use_cache=False, output_hidden_states=True).hidden_states
        # The first token sees itself alone.
        assert sink_loss(model, hidden, torch.tensor([[0, 0]])).item() == 0.0
        idle = torch.tensor([[0, 9]])
        at = [looks(model, hidden[n], n, *idle.unbind(1), 2)[0, :, 0] for n in LAYERS]
        expected = (math.log(ENOUGH) - torch.stack(at)).clamp(min=0).mean()
        assert not mismatch(sink_loss(model, hidden, idle), expected)
        assert sink_loss(model, hidden, idle[:0]).item() == 0.0


def test_heads_learn_to_rest(model, tokenizer):
    batch = Feed(tokenizer, tokens=512, seed=1).batch(np.random.default_rng(0), 128)
    ids, before = batch.ids.long(), sink_mass(model, batch.ids.long())[1:].mean()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(12):
        hidden = model(ids[:, :-1], use_cache=False, output_hidden_states=True).hidden_states
        optimizer.zero_grad()
        sink_loss(model, hidden, batch.idle).backward()
        optimizer.step()
    assert sink_mass(model, ids)[1:].mean() > max(0.3, 5 * before)


def test_hints_and_sinks_fade():
    config = TextSettings(fade=0.2)
    assert [config.help_at(p) for p in (0.0, 0.8, 1.0)] == [1.0, pytest.approx(1.0), 0.0]
    assert config.help_at(0.9) == pytest.approx(0.5) and TextSettings(fade=0).help_at(1.0) == 1.0
    with pytest.raises(ValueError, match="fade=1.5 is not a share"):
        TextSettings(fade=1.5)
    with pytest.raises(ValueError, match="average=1.0 lies outside"):
        TextSettings(average=1.0)


def test_evaluate_tells_where_heads_rest(model, tokenizer):
    mass = evaluate.resting(model, tokenizer)
    assert mass.shape == (4, 4) and bool(((mass > 0) & (mass < 1)).all())
    assert evaluate.sink_table(mass).row_count == 4
