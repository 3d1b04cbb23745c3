"""More computation for one question: the well-defined decoders of arXiv 2504.01281, appendix D, over a forked prefix.

Self-consistency and best-of-n take answers that were drawn already (`textkv.rag.sampling`). Here: CoT decoding, the
model's own rating for best-of-n, reading twice (RE2), and a mixture of candidates, critique and synthesis (MoA). What
is left out needs code that is run (RTO) or is a search whose rules the paper leaves open (MCTS, R*, PlanSearch).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from textkv.rag.answer import Reader
from textkv.rag.sampling import Prefix, best_of, samples

_RATE = "{prompt}\n\nAnswer: {answer}\n\nHow good is this answer, from 0 to 10? Say one number."
_CRITICISE = "{prompt}\n\n{candidates}\n\nSay in short what is right and what is wrong in each of these answers."
_JOIN = "{prompt}\n\n{candidates}\n\nCritique: {critique}\n\nWrite the best answer, and nothing else."


def read_twice(question: str) -> str:
    """RE2: the question, and the question again."""
    return f"{question}\nRead the question again: {question}"


def chain_decoded(prefix: Prefix, k: int = 10, most: int = 48) -> str:
    """CoT decoding: of the branches over the k likeliest first tokens, the answer that is surest; the sureness of equal
    answers adds up. k = 1 is greedy decoding.

    Raises:
        ValueError: k below 1.
    """
    total: dict[str, float] = {}
    for text, sure in prefix.branches(k, most):
        total[text] = total.get(text, 0.0) + sure
    return max(total, key=total.__getitem__)


def rating(text: str) -> float:
    """The first number from 0 to 10 in what a model said; NaN where there is none, which `best_of` puts last."""
    found = (float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", text))
    return next((number for number in found if number <= 10), float("nan"))


def rated(reader: Reader, prompt: str) -> Callable[[str], float]:
    """How the model itself rates an answer to `prompt`, drawn at temperature 0.1: one call for each answer."""

    def rate(answer: str) -> float:
        return rating(Prefix(reader, _RATE.format(prompt=prompt, answer=answer)).sample(0.1, 8))

    return rate


def best_rated(reader: Reader, prompt: str, n: int = 3, most: int = 48, seed: int = 0) -> str:
    """Best of n by the model's own rating: n answers from one prefix and n ratings. n = 1 is a plain sample.

    Raises:
        ValueError: n below 1.
    """
    drawn = samples(Prefix(reader, prompt), n, most=most, seed=seed)
    return drawn[0] if n == 1 else best_of(drawn, rated(reader, prompt))


def mixed(reader: Reader, prompt: str, n: int = 3, most: int = 48, seed: int = 0) -> str:
    """MoA: n answers at temperature 1 from one prefix, one critique of all at 0.7, one synthesis at 0.1; n + 2 calls.
    n = 1 is a plain sample: there is nothing to join.

    Raises:
        ValueError: n below 1.
    """
    drawn = samples(Prefix(reader, prompt), n, most=most, seed=seed)
    if n == 1:
        return drawn[0]
    candidates = "\n".join(f"Answer {number}: {answer}" for number, answer in enumerate(drawn, 1))
    critique = Prefix(reader, _CRITICISE.format(prompt=prompt, candidates=candidates)).sample(0.7, 2 * most, seed)
    joined = _JOIN.format(prompt=prompt, candidates=candidates, critique=critique)
    return Prefix(reader, joined).sample(0.1, most, seed)
