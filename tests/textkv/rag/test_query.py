"""What to ask for: weights of layers, the planted word, the order of the text."""

import pytest
import torch

from textkv.models.loading import load
from textkv.rag.query import layer_weights, pick, relevance
from textkv.rag.watched import pool
from textkv.rag.words import Word, words_in

WORDS = [Word(n, n + 1, f"word{n}") for n in range(6)]


def test_weights_jump_at_the_thirds_and_end_in_nothing():
    assert layer_weights(6).tolist() == pytest.approx([0.1, 0.0, 0.25, 0.3, 0.15, 0.0])


@pytest.mark.parametrize("normalize", ["minmax", "none"])
def test_a_planted_word_comes_first(normalize):
    torch.manual_seed(0)
    pooled = torch.randn(6, 8)
    row = torch.zeros(6, 2, 6)
    row[..., 3] = 1
    own = pooled[3] * 2
    scores = relevance(row, pooled, own, WORDS, normalize=normalize)
    assert scores.argmax() == 3 and pick(WORDS, scores, 1) == ["word3"]


def test_words_keep_the_order_of_the_text_and_come_once():
    scores = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.0, 0.3])
    assert pick(WORDS, scores, 3) == ["word1", "word3", "word5"]
    assert pick(WORDS, scores, 60) == [word.text for word in WORDS]
    twice = [Word(0, 1, "Cat"), Word(1, 2, "dog"), Word(2, 3, "cat")]
    assert pick(twice, torch.tensor([0.1, 0.2, 0.9]), 5) == ["dog", "cat"]
    with pytest.raises(ValueError, match="k=0"):
        pick(twice, torch.zeros(3), 0)


def test_pooling_leans_on_the_last_layers():
    states = torch.eye(30)[:, None]
    weights = pool(states)[0]
    assert weights[-1] == pytest.approx(0.39, abs=0.01) and weights[-2] == pytest.approx(0.24, abs=0.01)


def test_refusals():
    with pytest.raises(ValueError, match="beta=2"):
        relevance(torch.ones(2, 1, 6), torch.ones(6, 2), torch.ones(2), WORDS, beta=2)
    with pytest.raises(ValueError, match="normalize='mean'"):
        relevance(torch.ones(2, 1, 6), torch.ones(6, 2), torch.ones(2), WORDS, normalize="mean")


def test_pieces_of_a_word_stand_together():
    _, tokenizer = load("mini")
    ids = tokenizer("The lighthouse of Varn, 1874.", add_special_tokens=False).input_ids
    words = words_in(tokenizer, ids, start=5)
    assert [word.text for word in words] == ["The", "lighthouse", "of", "Varn", ",", "1874", "."]
    assert [word.text for word in words if word.telling] == ["lighthouse", "Varn"]
    assert words_in(tokenizer, []) == []
    assert words[0].start == 5 and words[-1].stop == 5 + len(ids)
    assert all(a.stop == b.start for a, b in zip(words, words[1:], strict=False))
