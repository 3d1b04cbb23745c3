"""Text while it is written, stop strings, and a generator for each row."""

from __future__ import annotations

import pytest
import torch

from dlm import stream
from dlm.decode import decode
from tests.dlm.test_decode import Script
from tests.dlm.toys import END, MASK, Rule, llada, prompts
from training.dlm.tokenizer import build_tokenizer


class Letters:
    """A tokenizer: token i is the i-th letter, the end of text nothing."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(97 + i) for i in ids if not (skip_special_tokens and i == END))


def spell(text: str) -> list[int]:
    return [ord(letter) - 97 for letter in text]


@pytest.mark.parametrize("unmask", ["confidence", "threshold(0.35)", "random", "edit(0.3,0.2)", "wino(0.2,0.9)"])
@pytest.mark.parametrize("block", [4, 12])
def test_pieces_make_the_answer_and_are_never_taken_back(unmask, block):
    model, (ids, mask) = llada(), prompts(3, 9, 5)
    model.head.weight.data[END] += 0.15
    options = dict(gen_length=12, block_length=block, unmask=unmask)
    seeded = [[torch.Generator().manual_seed(row) for row in range(3)] for _ in range(2)]
    whole = decode(model, ids, mask, generator=seeded[0], **options)
    texts = [[] for _ in range(3)]
    closed = []
    for piece in stream(model, ids, mask, generator=seeded[1], tokenizer=Letters(), **options):
        assert piece.row not in closed and piece.text == Letters().decode(piece.ids.tolist())
        texts[piece.row] += piece.ids.tolist()
        closed += [piece.row] * piece.done
    assert sorted(closed) == [0, 1, 2]
    for row, count in zip(range(3), whole.stats.text_tokens, strict=True):
        assert texts[row] == whole.ids[row, :count].tolist()


@pytest.mark.parametrize("unmask", [Rule(), Rule(quota=3)])
def test_a_stop_string_across_blocks_ends_the_row(unmask):
    """ "def" begins in the first block and ends in the second; the text behind it is never computed."""
    model = Script(spell("abcdefgh"))
    ids = torch.zeros(1, 3, dtype=torch.int64)
    options = dict(gen_length=8, block_length=4, cache="none", unmask=unmask, stop="def", tokenizer=Letters())
    got = decode(model, ids, **options)
    assert got.ids.tolist() == [[*spell("abcdef"), END, END]]
    assert got.stats.forwards == {1: 6, 3: 3}[unmask.quota]
    pieces = list(stream(model, ids, **options))
    # "d" and "de" may become the stop string, so they wait; what ended with it is not given out.
    assert "".join(piece.text for piece in pieces) == "abc" and pieces[-1].done


def test_text_waits_only_as_long_as_it_may_become_a_stop_string():
    model = Script(spell("abcdaefg"))
    pieces = stream(model, torch.zeros(1, 3, dtype=torch.int64), gen_length=8, block_length=4, cache="none",
                    unmask=Rule(), stop=("cdy", "fgh"), tokenizer=Letters())  # fmt: skip
    texts = [piece.text for piece in pieces]
    assert texts[:5] == ["a", "b", "", "", "cda"] and "".join(texts) == "abcdaefg"


def test_stops_of_a_real_tokenizer():
    tokenizer = build_tokenizer()
    words = tokenizer("tom has 37 apples.", add_special_tokens=False)["input_ids"]
    from dlm.ends import StopStrings

    stops = StopStrings(("apples",), tokenizer, tokenizer.eos_token_id)
    count = stops.tokens_to_stop(words)
    assert "apples" in tokenizer.decode(words[:count]) and "apples" not in tokenizer.decode(words[: count - 1])
    assert stops.tokens_to_stop(words[: count - 1]) is None


@pytest.mark.parametrize("unmask", ["random", "origin", "confidence", "threshold(0.3)", "maskgit_plus(alg_temp=0.5)"])
def test_a_generator_for_each_row_draws_what_the_row_draws_alone(unmask):
    model, (ids, mask) = llada(), prompts(3, 9, 5)
    options = dict(gen_length=12, block_length=4, unmask=unmask, temperature=0.8)
    made = [torch.Generator().manual_seed(row) for row in range(3)]
    together = decode(model, ids, mask, generator=made, **options)
    for row, length in enumerate((3, 9, 5)):
        alone = decode(
            model, ids[row : row + 1, 9 - length :], generator=[torch.Generator().manual_seed(row)], **options
        )
        assert torch.equal(alone.ids[0], together.ids[row])


def test_the_defaults_work_and_errors_say_what_to_do():
    model, (ids, mask) = llada(), prompts(3, 5)
    assert decode(model, ids, mask, gen_length=16).ids.shape == (2, 16)
    for options, message in (
        (dict(stop=("a",)), "stop=.* is text; give decode\\(\\) the model's tokenizer too"),
        (dict(stop=("",)), "every stop string must be a text that is not empty"),
        (dict(generator=[torch.Generator()]), "1 generators for 2 rows; give one for each row, or one for all"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(model, ids, mask, gen_length=4, **options)
    with pytest.raises(ValueError, match="gaps are filled in any order; use decode"):
        next(stream(model, ids.clone().fill_(MASK), gen_length=0))
