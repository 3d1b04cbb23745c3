"""Answers from one read prompt: forks leave the prefix alone, and the prompt is read once."""

import pytest

from textkv.models.loading import load
from textkv.rag import Reader
from textkv.rag.sampling import Prefix, best_of, samples, self_consistent

PROMPT = "[1] The lighthouse of Varn was built by Ilse Korr.\nQuestion: Who built it?"


@pytest.mark.parametrize("cache, budget", [("full", None), ("critic", 0.5)])
def test_one_prefill_and_forks_that_do_not_disturb_each_other(cache, budget):
    model, tokenizer = load("mini")
    reader = Reader(model, tokenizer, cache, budget)
    read = []
    hook = model.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    try:
        prefix = Prefix(reader, PROMPT)
        first = prefix.sample(0, most=5)
        drawn = samples(prefix, 3, most=5)
        assert prefix.sample(0, most=5) == first and samples(prefix, 3, most=5) == drawn
    finally:
        hook.remove()
    assert [n for n in read if n > 1] == [prefix.prefill_tokens]
    ids = reader.encode(PROMPT)
    alone = tokenizer.decode(reader.decode(reader.empty(), ids, 5), skip_special_tokens=True).strip()
    assert first == alone


def test_the_largest_cluster_wins_and_one_answer_is_itself():
    assert self_consistent(["a cat", "the lighthouse", "the lighthouse."]) == "the lighthouse"
    assert self_consistent(["x"]) == "x" == best_of(["x"], lambda _: float("nan"))


def test_best_of_takes_the_first_of_equals_and_no_nan():
    ratings = {"a": float("nan"), "b": 2.0, "c": 2.0}
    assert best_of(list(ratings), ratings.get) == "b"


def test_refusals():
    for call in (lambda: self_consistent([]), lambda: best_of([], len), lambda: samples(None, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            call()
