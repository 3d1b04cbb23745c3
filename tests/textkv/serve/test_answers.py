"""Text that is given out while tokens arrive: whole characters, and nothing of a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from textkv.serve.answers import Answer


def decode_bytes(ids):
    """A tokenizer of single bytes, where characters of several tokens are the rule."""
    return bytes(ids).decode("utf-8", errors="replace")


def pieces(text: bytes, stop=()):
    answer = Answer(decode_bytes, stop)
    given_out = [answer.add(token) for token in text]
    return [*given_out, answer.end()], answer


@given(st.text(max_size=40))
def test_pieces_together_are_the_whole_text(text):
    assert "".join(pieces(text.encode())[0]) == text


def test_a_character_comes_when_it_is_whole():
    given_out, _ = pieces("aé€😀b".encode())
    assert [x for x in given_out if x] == ["a", "é", "€", "😀", "b"]


@given(st.text(alphabet="ab", max_size=30), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_a_stop_string_ends_the_text_where_the_first_begins(text, stop):
    given_out, answer = pieces(text.encode(), stop)
    # The answer ends as soon as one is complete, so of two that overlap the one that is complete first counts.
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(word) for word in stop)]
    expected = text
    if ends:
        done = text[: ends[0]]
        expected = min((done[: -len(word)] for word in stop if done.endswith(word)), key=len)
    assert "".join(given_out) == expected
    assert answer.stopped == bool(ends)


@pytest.mark.parametrize("text", ["half a stop: EN", "E", "xEEN"])
def test_the_beginning_of_a_stop_string_is_held_back_until_the_end(text):
    given_out, answer = pieces(text.encode(), ["END"])
    assert "".join(given_out) == text and not answer.stopped
    assert given_out[-1] and "END".startswith(given_out[-1])


def test_damaged_bytes_stay_damaged_at_the_end():
    given_out, _ = pieces(b"a\xf0\x9f")
    assert "".join(given_out) == decode_bytes(b"a\xf0\x9f")
