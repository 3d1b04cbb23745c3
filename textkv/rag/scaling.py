"""More computation for one question: the well-defined decoders of arXiv 2504.01281, appendix D, over a forked prefix.

Self-consistency and best-of-n take answers that were drawn already (`textkv.rag.sampling`); entropy-guided decoding is
in `textkv.rag.entropy`. Here: CoT decoding, the model's own rating for best-of-n, reflection, reading twice (RE2), a
mixture of candidates, critique and synthesis (MoA), the round trip (RTO) and PlanSearch. MCTS and R* are left out: what
a state is and how it is rolled out, the paper does not say.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from textkv.rag.answer import Reader
from textkv.rag.sampling import Prefix, alike, best_of, samples

_RATE = "{prompt}\n\nAnswer: {answer}\n\nHow good is this answer, from 0 to 10? Say one number."
_CRITICISE = "{prompt}\n\n{candidates}\n\nSay in short what is right and what is wrong in each of these answers."
_REFLECT = (
    "{prompt}\n\nThink step by step in <thinking> tags, look for mistakes in <reflection> tags, and give the final "
    "answer in <output> tags."
)
_DESCRIBE = "{answer}\n\nSay exactly what this text answers or does, so that somebody could write it again from that."
_AGAIN = "{told}\n\nWrite the text that is described here, and nothing else."
_MERGE = "{prompt}\n\nAnswer 1: {one}\nAnswer 2: {two}\n\nWrite the one best answer, and nothing else."
_OBSERVE = "{prompt}\n\nSay {n} short observations that help to answer, and nothing else."
_DERIVE = "{prompt}\n\nObservations: {seen}\n\nDerive {n} further short observations from these, and nothing else."
_STRATEGY = "{prompt}\n\nObservations: {seen}\n\nSay in one or two sentences how to find the answer."
_SOLVE = "{prompt}\n\nStrategy: {strategy}\n\nFollow it, and write the answer and nothing else."
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


def output_of(text: str) -> str:
    """The output section of a reflected answer; where there is none, the text without tags and what they hold."""
    found = re.search(r"<output>(.*?)(</output>|$)", text, re.DOTALL)
    if found:
        return found[1].strip()
    bare = re.sub(r"<(thinking|reflection)>.*?(</\1>|$)", "", text, flags=re.DOTALL)
    return re.sub(r"</?\w+>", "", bare).strip()


def reflected(reader: Reader, prompt: str, most: int = 192, seed: int = 0) -> str:
    """CoT with reflection: one answer at temperature 0.6 in sections for thinking, reflection and output, of which the
    output is returned; one call."""
    return output_of(Prefix(reader, _REFLECT.format(prompt=prompt)).sample(0.6, most, seed))


def round_trip(reader: Reader, prompt: str, most: int = 48, seed: int = 0) -> str:
    """RTO: an answer, what it says in other words, and an answer from those words alone, all at temperature 0.1. Two
    alike (`self_consistent`'s ratio) stand; others are merged. 3 or 4 calls."""
    one = Prefix(reader, prompt).sample(0.1, most, seed)
    told = Prefix(reader, _DESCRIBE.format(answer=one)).sample(0.1, 2 * most, seed)
    two = Prefix(reader, _AGAIN.format(told=told)).sample(0.1, most, seed)
    if alike(one, two):
        return one
    return Prefix(reader, _MERGE.format(prompt=prompt, one=one, two=two)).sample(0.1, most, seed)


def plan_searched(reader: Reader, prompt: str, first: int = 3, derived: int = 2, most: int = 48, seed: int = 0) -> str:
    """PlanSearch: observations, further ones derived from them, a strategy, and the answer by it; 4 calls, each at
    temperature 0.7, the answer at 0.1.

    Raises:
        ValueError: no first observation, or a negative number of derived ones.
    """
    if first < 1 or derived < 0:
        raise ValueError(f"first={first}, derived={derived}: a plan needs at least 1 observation, and not fewer than 0")
    seen = Prefix(reader, _OBSERVE.format(prompt=prompt, n=first)).sample(0.7, 2 * most, seed)
    if derived:
        seen += "\n" + Prefix(reader, _DERIVE.format(prompt=prompt, seen=seen, n=derived)).sample(0.7, 2 * most, seed)
    strategy = Prefix(reader, _STRATEGY.format(prompt=prompt, seen=seen)).sample(0.7, most, seed)
    return Prefix(reader, _SOLVE.format(prompt=prompt, strategy=strategy)).sample(0.1, most, seed)
