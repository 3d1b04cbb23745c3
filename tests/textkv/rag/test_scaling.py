"""Decoders over a forked prefix: one of anything is plain decoding, and calls are as many as the paper counts."""

import math

import pytest

from textkv.models.loading import load
from textkv.rag import Reader
from textkv.rag import scaling as s
from textkv.rag.sampling import Prefix

PROMPT = "[1] the code of falcon is amber 47 .\nQuestion: what is the code of falcon ?"


@pytest.fixture(scope="module")
def reader():
    return Reader(*load("mini"))


@pytest.fixture
def prefixes(monkeypatch):
    """Prompts that were read."""
    read = []
    begin = Prefix.__init__

    def noted(self, reader, prompt):
        read.append(prompt)
        begin(self, reader, prompt)

    monkeypatch.setattr(Prefix, "__init__", noted)
    return read


def test_one_branch_is_greedy_and_all_share_one_prefix(reader, prefixes):
    prefix = Prefix(reader, PROMPT)
    [(text, sure)] = prefix.branches(1, most=6)
    assert text == prefix.sample(0, most=6) == s.chain_decoded(prefix, 1, most=6) and 0 < sure <= 1
    texts = [text for text, _ in prefix.branches(4, most=6)]
    assert len(set(texts)) == len(texts) == 4 and texts[0] == text and len(prefixes) == 1


def test_equal_answers_add_up():
    class Branches:
        def branches(self, k, most):
            return [("a", 0.5), ("b", 0.3), ("b", 0.3)]

    assert s.chain_decoded(Branches()) == "b"


@pytest.mark.parametrize(
    "said, value", [("8", 8), ("I say 7.5 of 10", 7.5), ("2024, so 3", 3), ("none", math.nan), ("11", math.nan)]
)
def test_ratings_that_are_malformed_are_no_numbers(said, value):
    assert s.rating(said) == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize("decoder, calls", [(s.best_rated, 1 + 3), (s.mixed, 1 + 2)])
def test_calls_are_counted_and_one_is_a_plain_sample(reader, prefixes, decoder, calls):
    drawn = decoder(reader, PROMPT, 3, most=4)
    assert len(prefixes) == calls and drawn == decoder(reader, PROMPT, 3, most=4)
    assert decoder(reader, PROMPT, 1, most=4) == Prefix(reader, PROMPT).sample(most=4)
    with pytest.raises(ValueError, match="n=0"):
        decoder(reader, PROMPT, 0)


def test_reading_twice_says_it_twice():
    assert s.read_twice("Who?").count("Who?") == 2
