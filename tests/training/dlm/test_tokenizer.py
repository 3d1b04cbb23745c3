"""The shared tokenizer: words and digits are single tokens, a problem's text comes back, a saved file is the same."""

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dlm.mini.problems import make_problem
from dlm.mini.words import all_words
from training.dlm.tokenizer import SPECIAL_TOKENS, build_tokenizer

TOKENIZER = build_tokenizer()


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2_000_000))
def test_text_comes_back(seed):
    problem = make_problem(seed)
    for text in (problem.prompt, problem.answer):
        ids = TOKENIZER(text)["input_ids"]
        assert TOKENIZER.decode(ids) == text
        assert TOKENIZER(TOKENIZER.decode(ids))["input_ids"] == ids


def test_numbers_are_digits_and_case_and_blanks_do_not_count():
    ids = TOKENIZER("Tom has 37 apples.")["input_ids"]
    assert TOKENIZER.convert_ids_to_tokens(ids) == ["tom", "has", "3", "7", "apples", "."]
    assert TOKENIZER("tom  has\n3 7 apples .")["input_ids"] == ids


def test_strange_words_are_unknown():
    ids = TOKENIZER("tom has 3 zebras!")["input_ids"]
    assert ids[-2:] == [TOKENIZER.unk_token_id] * 2 and TOKENIZER.unk_token_id not in ids[:-2]


def test_special_tokens_come_first_and_prompts_are_padded_on_the_left():
    assert TOKENIZER.convert_ids_to_tokens(range(4)) == list(SPECIAL_TOKENS)
    assert len(TOKENIZER) == len(SPECIAL_TOKENS) + len(all_words())
    both = TOKENIZER(["tom has 3", "tom"], padding=True)["input_ids"]
    assert both[1][:2] == [TOKENIZER.pad_token_id] * 2
    marked = TOKENIZER("tom <mask> </s>")["input_ids"]
    assert marked[1:] == [TOKENIZER.mask_token_id, TOKENIZER.eos_token_id]


def test_saved_and_read_again(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = make_problem(1).answer
    assert again(text)["input_ids"] == TOKENIZER(text)["input_ids"] and again.decode(again(text)["input_ids"]) == text
    assert (again.pad_token_id, again.eos_token_id, again.mask_token_id, again.padding_side) == (0, 1, 2, "left")
