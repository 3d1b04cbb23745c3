"""The problems: solvable from their text alone, worked correctly, apart from those of the training."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm.mini.problems import (
    FIRST_EVALUATION_SEED,
    LEAST,
    MOST,
    MOST_STEPS,
    SHARES,
    TEMPLATES,
    draw_problem,
    final_answer,
    held_out,
    make_problem,
    prompt_tokens,
    working,
)
from dlm.mini.words import ENTERS, GAINED, GAINS, LEAVES, LOSSES, LOST, all_words
from training.dlm.tokenizer import UNK, build_tokenizer

UP = {*GAINS, *GAINED, "more", *(first for first, _ in ENTERS if first not in {"get", "walk"})}
DOWN = {*LOSSES, *LOST, "fewer", *(first for first, _ in LEAVES if first not in {"get", "walk"})}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def read(prompt: str) -> tuple[int, list[int]]:
    """Start and changes by the words next to each number, without the generator."""
    words = re.findall(r"[a-z]+|\d+|[.,?]", prompt)
    at = [n for n, word in enumerate(words) if word.isdigit()]
    changes = []
    for n in at[1:]:
        around = [words[n - 1], *words[n + 1 : n + 3]]
        if around[1:] in ([list(pair) for pair in ENTERS]) or UP & {around[0], around[1]}:
            changes.append(int(words[n]))
        else:
            assert around[1:] in [list(pair) for pair in LEAVES] or DOWN & {around[0], around[1]}, prompt
            changes.append(-int(words[n]))
    return int(words[at[0]]), changes


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2 * FIRST_EVALUATION_SEED))
def test_a_problem_can_be_solved_from_its_text(seed):
    problem = make_problem(seed)
    start, changes = read(problem.prompt)
    assert (start, tuple(changes)) == (problem.start, problem.changes)
    assert final_answer(problem.answer) == problem.total == start + sum(changes)
    assert held_out(start, changes) == (seed >= FIRST_EVALUATION_SEED)


@settings(max_examples=200, deadline=None)
@given(totals=st.lists(st.integers(LEAST, MOST), min_size=2, max_size=4))
def test_every_written_step_is_right(totals):
    changes = [after - before for before, after in zip(totals, totals[1:], strict=False)]
    written = re.findall(r"=(\d)([,'])(\d)", working(totals[0], changes))
    assert [10 * int(tens) + int(ones) for ones, _, tens in written] == totals
    for before, change, (_, mark, _) in zip(totals[:-1], changes, written[1:], strict=True):
        ones = before % 10 + (abs(change) % 10) * (1 if change >= 0 else -1)
        assert (mark == "'") == (not 0 <= ones <= 9)
    sizes = re.findall(r"[+-](\d)(\d)", working(totals[0], changes))
    assert [10 * int(tens) + int(ones) for ones, tens in sizes] == [abs(change) for change in changes]


def test_the_working_reads_as_documented():
    assert working(37, (25, -14)) == "=7,3 +52 =2'6 -41 =8'4 #### 48"


def test_working_refuses_totals_of_one_or_three_digits():
    with pytest.raises(ValueError, match=r"totals \[50, 105\] leave 10..99"):
        working(50, (55,))


def test_sizes(tokenizer):
    rng = np.random.default_rng(0)
    problems = [draw_problem(rng) for _ in range(2000)]
    prompts = [len(ids) for ids in tokenizer([p.prompt for p in problems])["input_ids"]]
    assert max(prompts) == prompt_tokens(3)
    assert {len(p.changes) for p in problems} == {1, 2, 3}
    assert len({p.prompt.split()[0] for p in problems}) > 10 and len(TEMPLATES) == 4
    marked = sum("'" in p.answer for p in problems)
    assert 0.5 < marked / len(problems) < 0.95


def test_hard_problems_are_longer(tokenizer):
    rng = np.random.default_rng(0)
    problems = [draw_problem(rng, task="hard") for _ in range(600)]
    lengths = [len(p.changes) for p in problems]
    assert set(lengths) == set(SHARES["hard"]) == {4, 5, 6} and max(lengths) == MOST_STEPS
    prompts = tokenizer([p.prompt for p in problems])["input_ids"]
    for steps in SHARES["hard"]:
        assert max(len(ids) for ids, k in zip(prompts, lengths, strict=True) if k == steps) == prompt_tokens(steps)
    for problem in problems[:100]:
        assert read(problem.prompt) == (problem.start, list(problem.changes))
        assert final_answer(problem.answer) == problem.total


def test_every_word_is_in_the_vocabulary(tokenizer):
    ids = tokenizer(" ".join(all_words()))["input_ids"]
    assert tokenizer.convert_tokens_to_ids(UNK) not in ids and len(ids) == len(all_words())
    for seed in range(300):
        problem = make_problem(seed)
        assert tokenizer.convert_tokens_to_ids(UNK) not in tokenizer(problem.prompt + problem.answer)["input_ids"]


def test_the_same_seed_gives_the_same_problem():
    assert make_problem(FIRST_EVALUATION_SEED) == make_problem(FIRST_EVALUATION_SEED)
    assert make_problem(3) != make_problem(4)
    assert make_problem(5, steps=2, top=39) == make_problem(5, steps=2, top=39)
    assert all(len(make_problem(seed, steps=2, top=39).changes) == 2 for seed in range(20))


@pytest.mark.parametrize(
    ("text", "number"),
    [("=7,3 #### 48", 48), ("#### 4 8", 48), ("#### 12 #### 7", 7), ("48", None), ("####", None), ("", None)],
)
def test_final_answer(text, number):
    assert final_answer(text) == number


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, "seed=-1 is negative; use 0 or more"),
        ({"seed": 1, "steps": 7}, "steps=7 is not a number of steps; use 1 to 6"),
        ({"seed": 1, "top": 12}, "top=12 leaves no problems; use 20 to 99"),
        ({"seed": 1, "top": 100}, "top=100"),
    ],
)
def test_bad_requests_say_what_to_change(wrong, message):
    with pytest.raises(ValueError, match=message):
        make_problem(**wrong)
