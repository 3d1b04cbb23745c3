"""Synthetic samples: passkeys are in the context and asked in order; lengths, depths, marks, refusals."""

import numpy as np
import pytest

from textkv.duo.passkeys import ORDINALS, WORDS, PasskeyConfig, Passkeys, recall_sample
from textkv.mini.filler import sentences
from textkv.mini.rows import Rows
from training.text.tokenizer import build_tokenizer

SMALL = PasskeyConfig(count=3, words=4, shortest=100, longest=400)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(" " + " ".join(words) for words in sentences(500, seed=0))


def answers_of(tokenizer, sample):
    """The words of each answer, from its marks."""
    edges = np.flatnonzero(np.diff(sample.passkeys.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(sample.ids[a:b].tolist()).split() for a, b in edges]


def test_every_passkey_is_hidden_and_asked(tokenizer):
    passkeys = Passkeys(tokenizer, SMALL)
    for seed in range(20):
        sample = passkeys.sample(np.random.default_rng(seed))
        assert len(sample.ids) == len(sample.tail) == len(sample.passkeys) <= 400
        assert sample.ids[0] == tokenizer.bos_token_id and not sample.passkeys[~sample.tail].any()
        begin = int(sample.tail.argmax())
        assert sample.tail[begin:].all()
        context, tail = (tokenizer.decode(x.tolist()) for x in (sample.ids[1:begin], sample.ids[begin:]))
        answers = answers_of(tokenizer, sample)
        assert len(answers) == 3 and all(len(a) == 4 and set(a) <= set(WORDS) for a in answers)
        for nth, words in zip(ORDINALS, answers, strict=False):
            assert f"the {nth} passkey: {' '.join(words)}.\n\n" in context
            assert f"What was the {nth} passkey? The {nth} passkey: {' '.join(words)}" in tail


def test_draws_are_fresh_and_repeatable(tokenizer):
    passkeys = Passkeys(tokenizer, SMALL)
    one, same, other = (passkeys.sample(np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(one.ids, same.ids) and not np.array_equal(one.ids[:50], other.ids[:50])


def test_the_authors_defaults():
    config = PasskeyConfig()
    assert (config.count, config.words, config.shortest, config.longest) == (10, 32, 1000, 32000)
    assert len(WORDS) == len(set(WORDS)) == 26


def test_a_text_of_ones_own(tokenizer):
    text = "\n".join(" ".join(words) for words in sentences(200, seed=5))
    sample = Passkeys(tokenizer, SMALL, text).sample(np.random.default_rng(0))
    middle = tokenizer.decode(sample.ids[1:20].tolist())
    assert middle.strip().split("\n")[0] in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: PasskeyConfig(count=11), "count=11: a sample hides 1 to 10 passkeys"),
        (lambda t: PasskeyConfig(words=0), "words=0"),
        (lambda t: PasskeyConfig(shortest=500, longest=400), "shortest=500, longest=400"),
        (lambda t: Passkeys(t, SMALL, "too short"), "the text has .* tokens, samples of up to 400 are drawn from it"),
        (lambda t: Passkeys(t, PasskeyConfig(10, 32, 10, 300)), "longest=300 leaves no room for a haystack: 10"),
    ],
)
def test_refusals(tokenizer, make, message):
    with pytest.raises(ValueError, match=message):
        make(tokenizer)


def test_rows_of_the_embedded_models_tasks(tokenizer):
    sample = recall_sample(Rows(tokenizer), np.random.default_rng(3), 256)
    assert len(sample.ids) == 256 and sample.passkeys.any() and not sample.passkeys[~sample.tail].any()
