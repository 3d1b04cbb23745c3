"""The embedded text model's recall tasks: words, facts, filler, examples."""

import numpy as np
import pytest

from textkv.intervals import wilson
from textkv.mini.facts import KEYS, NUMBERS, TASKS, VALUES, draw_facts, held_out
from textkv.mini.filler import Filler, sentences
from textkv.mini.tasks import make_example
from textkv.mini.words import CLASSES, PATTERNS, THINGS
from training.text.tokenizer import build_tokenizer

EVALUATION = 1_000_000


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(" " + " ".join(words) for words in sentences(2000, seed=0))


def test_word_lists_do_not_overlap():
    filler = {word for words in (*CLASSES.values(), *PATTERNS) for word in words}
    lists = [set(KEYS), set(VALUES), set(THINGS), set(NUMBERS), filler]
    assert sum(map(len, lists)) == len(set().union(*lists))
    assert len(set(KEYS)) == len(KEYS) and len(set((*VALUES, *THINGS))) == len(VALUES) + len(THINGS)


def resolve(prompt: str, task: str) -> str:
    """The answer found by reading the prompt alone, without the generator."""
    facts, asked = prompt.rsplit(" question :", 1)
    words, (_, kind, _, key, _) = facts.split(), asked.split()

    def after(key: str, count: int) -> list[str]:
        mark = ["the", kind, "of", key, "is"]
        begins = [n for n in range(len(words)) if words[n : n + 5] == mark]
        assert len(begins) == 1
        return words[begins[0] + 5 : begins[0] + 5 + count]

    if task == "needle":
        return " " + " ".join(after(key, 2))
    if task == "copy":
        return " " + " ".join(after(key, 8))
    second = after(key, 4)[3]
    assert second in KEYS
    return f" the code of {second} is " + " ".join(after(second, 2))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [128, 500])
def test_the_answer_can_be_read_from_the_prompt(tokenizer, task, length):
    for seed in (3, EVALUATION, EVALUATION + 1):
        example = make_example(task, length, seed, tokenizer)
        assert example.answer == resolve(example.prompt, task)
        assert len(example.prompt_ids) + len(example.answer_ids) == length
        assert tokenizer(example.prompt)["input_ids"] == example.prompt_ids.tolist()
        begin, end = example.spans[-1]
        statement = tokenizer.decode(example.prompt_ids[begin:end].tolist())
        assert statement.endswith(" ".join(example.answer.split()[-2:]) + " .")
        assert len(example.spans) == (2 if task == "two-hop" else 1)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_depth_is_honoured(tokenizer, task, depth):
    for seed in range(EVALUATION, EVALUATION + 5):
        example = make_example(task, 1024, seed, tokenizer, depth=depth)
        assert example.depth == pytest.approx(depth, abs=0.0 if depth in (0.0, 1.0) else 0.08)


def test_the_same_seed_gives_the_same_example(tokenizer):
    one, two = (make_example("needle", 256, EVALUATION, tokenizer) for _ in range(2))
    assert np.array_equal(one.prompt_ids, two.prompt_ids) and one.spans == two.spans
    other = make_example("needle", 256, EVALUATION + 1, tokenizer)
    assert not np.array_equal(one.prompt_ids, other.prompt_ids)


def pairs(facts):
    return {(words[3], words[5]) for f in facts if f.task != "copy" for words in f.statements[-1:]}


@pytest.mark.parametrize("evaluation", [False, True])
def test_pairs_are_for_training_or_for_evaluation(evaluation):
    rng = np.random.default_rng(0)
    seen = set().union(*(pairs(draw_facts(rng, ["needle", "two-hop", "copy"] * 4, evaluation)) for _ in range(50)))
    assert len(seen) > 300
    assert all(held_out(key, value) == evaluation for key, value in seen)


def test_every_key_has_values_on_both_sides():
    for key in KEYS:
        assert 0 < sum(held_out(key, value) for value in VALUES) < len(VALUES)


def test_many_facts_share_no_word():
    facts = draw_facts(np.random.default_rng(1), ["copy", "needle", "two-hop"] * 8, evaluation=True)
    words = [w for f in facts if f.task == "copy" for w in f.answer] + [f.answer[-2] for f in facts if f.task != "copy"]
    assert len(words) == len(set(words))


def test_training_and_evaluation_filler_differ():
    one, two = ({" ".join(words) for words in sentences(500, seed) if len(words) > 9} for seed in (11, 1_000_011))
    assert len(one & two) < 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"task": "needles"}, "did you mean needle"),
        ({"task": "poetry"}, "known: needle, two-hop, copy"),
        ({"length": 40}, "length=40 leaves no room for facts; use at least 96"),
        ({"length": 100, "facts": 12}, "tokens too short for 12 facts"),
        ({"facts": 60}, "60 facts are more than the words allow"),
        ({"facts": 0}, "facts=0 leaves nothing to ask"),
        ({"depth": 50.0}, "depth=50.0 is not a share"),
        ({"length": 10**7}, "is more than the filler's"),
    ],
)
def test_bad_requests_say_what_to_change(tokenizer, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_example(**{"task": "needle", "length": 256, "seed": 1, "tokenizer": tokenizer, **wrong})


def test_filler_starts_at_a_sentence_and_refuses_nothing(tokenizer):
    filler = Filler.text(tokenizer, "One line.\nAnother one.\nA third.\n" * 20)
    ids, starts = filler.draw(np.random.default_rng(0), 30)
    assert len(ids) == 30 and starts[0] == 0 and tokenizer.decode(ids.tolist())[0] in "OA"
    with pytest.raises(ValueError, match="no filler"):
        Filler.text(tokenizer, "")


def test_wilson():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(10, 10)[1] == 1.0 and wilson(0, 10)[0] == 0.0
    low, high = wilson(50, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    with pytest.raises(ValueError, match="successes=3"):
        wilson(3, 2)
