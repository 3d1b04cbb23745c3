"""Decoders over a forked prefix: one of anything is plain decoding, and calls are as many as the paper counts."""

import math
import re

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


@pytest.mark.parametrize("decoder, calls", [(s.reflected, [1]), (s.round_trip, [3, 4]), (s.plan_searched, [4])])
def test_chains_of_prompts_have_the_papers_number_of_calls(reader, prefixes, decoder, calls):
    made = decoder(reader, PROMPT, most=4)
    assert len(prefixes) in calls and made == decoder(reader, PROMPT, most=4)


def test_a_round_trip_that_comes_back_stands_and_another_is_merged(monkeypatch):
    said, asked = [], []

    class Says:
        def __init__(self, reader, prompt):
            asked.append(prompt)

        def sample(self, *settings):
            return said[len(asked) - 1]

    monkeypatch.setattr(s, "Prefix", Says)
    said[:] = ["amber 47", "the code of falcon", "amber 47."]
    assert s.round_trip(None, PROMPT) == "amber 47" and PROMPT not in asked[2]
    asked.clear()
    said[:] = ["amber 47", "the code of falcon", "blue 12", "joined"]
    assert s.round_trip(None, PROMPT) == "joined" and {"amber 47", "blue 12"} <= set(re.findall(r"\w+ \d+", asked[3]))
    asked.clear()
    with pytest.raises(ValueError, match="first=0"):
        s.plan_searched(None, PROMPT, first=0)
    assert not asked


@pytest.mark.parametrize(
    "said, output",
    [
        ("<thinking>a</thinking><reflection>b</reflection><output> c </output>", "c"),
        ("<thinking>a</thinking> <output>c, cut sh", "c, cut sh"),
        ("<thinking>a</thinking>\nc", "c"),
        ("<thinking>cut sh", ""),
        ("c", "c"),
    ],
)
def test_the_output_section_is_what_is_returned(said, output):
    assert s.output_of(said) == output


def test_reading_twice_says_it_twice():
    assert s.read_twice("Who?").count("Who?") == 2
