"""Training batches: layout, sizes, stages, errors."""

import pytest
import torch

from dlm.mini.problems import FIRST_EVALUATION_SEED, MOST, final_answer
from training.dlm.feed import HARD_STAGES, LONGEST, STAGES, Feed, Stage, answer_tokens, stage_at
from training.dlm.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_prompt_answer_and_tail_lie_where_the_batch_says(tokenizer, steps):
    batch = Feed(tokenizer, tokens=1100, seed=1, long=0.0).batch(3, Stage(0.0, steps, MOST))
    assert batch.answer in {answer_tokens(k) for k in range(1, steps + 1)}
    rows, length = batch.ids.shape
    assert rows > 5 and length <= 26 + answer_tokens(3) + 8
    behind = batch.ids[:, batch.prompt :]
    assert (behind[:, batch.answer - 1 :] == tokenizer.eos_token_id).all()
    assert (behind[:, : batch.answer - 1] != tokenizer.eos_token_id).all()
    assert torch.equal(batch.visible, batch.ids != tokenizer.pad_token_id)
    real = batch.visible.sum(1)
    assert torch.equal(batch.position_ids[:, -1], real - 1)
    first = batch.visible.int().argmax(1)
    assert (batch.position_ids[torch.arange(rows), first] == 0).all()
    texts = tokenizer.batch_decode(behind, skip_special_tokens=True)
    assert all(final_answer(text) is not None for text in texts)


def test_some_batches_have_long_tails_in_few_rows(tokenizer):
    feed = Feed(tokenizer, tokens=1100, seed=1, long=1.0)
    shapes = [feed.batch(number, STAGES[-1]).ids.shape for number in range(30)]
    assert max(length for _, length in shapes) > 500
    assert all(length <= LONGEST and rows * length <= 1.1 * 1100 for rows, length in shapes)


def test_a_batch_depends_on_seed_and_number_alone(tokenizer):
    one, two = (Feed(tokenizer, 1100, seed=1).batch(5, STAGES[-1]) for _ in range(2))
    assert torch.equal(one.ids, two.ids)
    other = Feed(tokenizer, 1100, seed=2).batch(5, STAGES[-1])
    assert other.ids.shape != one.ids.shape or not torch.equal(other.ids, one.ids)


def test_numbers_and_steps_grow(tokenizer):
    assert [stage_at(p) for p in (0.0, 0.099, 0.1, 0.3, 0.45, 1.0)] == [0, 0, 1, 2, 3, 3]
    assert [s.latest for s in STAGES] == sorted(s.latest for s in STAGES) and STAGES[0].latest == 0.0
    assert [stage_at(p, HARD_STAGES) for p in (0.0, 0.3, 1.0)] == [0, 1, 2]
    drawn = {Feed(tokenizer, 1100, seed=1).batch(number, HARD_STAGES[-1]).answer for number in range(30)}
    assert drawn == {answer_tokens(k) for k in (3, 4, 5, 6)}
    batch = Feed(tokenizer, 1100, seed=1).batch(0, STAGES[0])
    answers = tokenizer.batch_decode(batch.ids[:, batch.prompt :], skip_special_tokens=True)
    assert batch.answer == answer_tokens(1) and max(map(final_answer, answers)) <= 39


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": FIRST_EVALUATION_SEED}, "seed=1000000 is not a training seed"),
        ({"tokens": 50}, "tokens=50 is less than one long row; use at least 1056"),
        ({"long": 2.0}, "long=2.0 is not a share"),
    ],
)
def test_bad_feeds(tokenizer, wrong, message):
    with pytest.raises(ValueError, match=message):
        Feed(tokenizer, **{"tokens": 1100, "seed": 1, **wrong})
