"""What an answer is worth: fidelity to the passages and quality beside the reference (PORAG, arXiv 2504.01281, 2A).

    R = scale clip(0.7 fidelity + 0.3 quality, -10, 10)

Fidelity is the overlap of the answer with the passages by ROUGE-1, -2 and -L; quality is exact match, F1 of words and,
with an embedder, the cosine of the two texts. The paper does not say how the figures are joined: each is their mean
here. It trains two heads that predict these figures (`textkv.rag.heads`); given directly, no head can be played
against. ROUGE is taken as precision: a short answer of the passages' own words is faithful however long they are.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from textkv.rag.embedders import Embeds
from textkv.rag.index import words_of

_ARTICLES = {"a", "an", "the"}


class RewardError(ValueError):
    """A reward that is no number; the message says of what and what to do."""


def plain(text: str) -> list[str]:
    """Its words in lower case, without articles: what exact match and F1 compare."""
    return [word for word in words_of(text) if word not in _ARTICLES]


def exact_match(answer: str, reference: str) -> float:
    """1.0 where both have the same words in the same order, else 0.0."""
    return float(plain(answer) == plain(reference))


def word_f1(answer: str, reference: str) -> float:
    """F1 of the words that both have, 0..1; two texts without a word agree."""
    ours, theirs = plain(answer), plain(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = row
        row = [0]
        for place, other in enumerate(b):
            row.append(before[place] + 1 if word == other else max(before[place + 1], row[place]))
    return row[-1]


def fidelity(answer: str, passages: Sequence[str]) -> float:
    """Mean of ROUGE-1, ROUGE-2 and ROUGE-L precision of the answer, 0..1.

    n-grams are counted over all passages, the subsequence is that of the best passage. An answer of one word has no
    pair of words: it is judged without ROUGE-2. No words, no fidelity.
    """
    ours = words_of(answer)
    if not ours:
        return 0.0
    theirs = [words_of(passage) for passage in passages]
    figures = []
    for n in (1, 2):
        grams = _grams(ours, n)
        known = sum((_grams(words, n) for words in theirs), Counter())
        if grams:
            figures.append(sum((grams & known).values()) / grams.total())
    figures.append(max((longest_common(ours, words) for words in theirs), default=0) / len(ours))
    return sum(figures) / len(figures)


def _grams(words: Sequence[str], n: int) -> Counter:
    return Counter(tuple(words[first : first + n]) for first in range(len(words) - n + 1))


@dataclass(frozen=True)
class Reward:
    """Rewards of answers.

    Attributes:
        faithful, good: weights of fidelity and quality; 0.7 and 0.3 in the paper.
        limit: rewards are cut to -limit..limit.
        scale: what they are multiplied by after that; the paper's gamma, whose value it does not give.
        embeds: what the cosine is taken with; None leaves it out.

    Raises:
        ValueError: a negative weight, both 0, or a limit or scale that is not positive.
    """

    faithful: float = 0.7
    good: float = 0.3
    limit: float = 10.0
    scale: float = 1.0
    embeds: Embeds | None = None

    def __post_init__(self) -> None:
        if min(self.faithful, self.good) < 0 or not self.faithful + self.good > 0:
            raise ValueError(f"faithful={self.faithful}, good={self.good}: weights are at least 0, and not both 0")
        if not self.limit > 0:
            raise ValueError(f"limit={self.limit} must be positive; use 10")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale={self.scale} must be positive; use 1")

    def quality(self, answers: Sequence[str], references: Sequence[str]) -> list[float]:
        """Mean of exact match, F1 and, with an embedder, the cosine: one figure for each answer."""
        figures = [[exact_match(a, r), word_f1(a, r)] for a, r in zip(answers, references, strict=True)]
        if self.embeds is not None:
            ours, theirs = self.embeds.embed(list(answers)), self.embeds.embed(list(references))
            cosines = torch.nn.functional.cosine_similarity(ours.float(), theirs.float(), dim=-1)
            for row, cosine in zip(figures, cosines.tolist(), strict=True):
                row.append(cosine)
        return [sum(row) / len(row) for row in figures]

    def __call__(
        self, answers: Sequence[str], references: Sequence[str], passages: Sequence[Sequence[str]]
    ) -> list[float]:
        """One reward for each answer, from its reference and the passages that stood in its prompt.

        Raises:
            RewardError: one of them is no number.
        """
        return self.joined(self.parts(answers, references, passages), answers)

    def parts(
        self, answers: Sequence[str], references: Sequence[str], passages: Sequence[Sequence[str]]
    ) -> list[tuple[float, float]]:
        """(fidelity, quality) of each answer."""
        quality = self.quality(answers, references)
        return [(fidelity(a, given), good) for a, given, good in zip(answers, passages, quality, strict=True)]

    def joined(self, parts: Sequence[tuple[float, float]], answers: Sequence[str]) -> list[float]:
        """One reward for each (fidelity, quality), measured or predicted.

        Raises:
            RewardError: one of them is no number; the message has the answer.
        """
        rewards = []
        for (faithful, good), answer in zip(parts, answers, strict=True):
            value = checked(self.faithful * faithful + self.good * good, answer)
            rewards.append(self.scale * max(-self.limit, min(self.limit, value)))
        return rewards


def checked(value: float, answer: str) -> float:
    """`value`, if it is a finite number.

    Raises:
        RewardError: it is not.
    """
    if not math.isfinite(value):
        short = re.sub(r"\s+", " ", answer)[:60]
        raise RewardError(f"the reward of {short!r} is {value}; mend the embedder or the reward that gave it")
    return value


def advantages(rewards: Sequence[float], group: int, least: float = 0.1) -> list[float]:
    """(R - mean) / max(standard deviation, `least`) within each `group` of answers to one prompt, which follow one
    another; the variance is that of the group (1/G). Equal rewards give 0.

    Raises:
        ValueError: a group of one, which has nothing to be compared with, or rewards that do not fill whole groups.
    """
    if group < 2:
        raise ValueError(f"group={group}: an answer is compared with others to its prompt; use at least 2")
    if len(rewards) % group:
        raise ValueError(f"{len(rewards)} rewards do not fill groups of {group}")
    found = torch.tensor(rewards, dtype=torch.float64).view(-1, group)
    centred = found - found.mean(1, keepdim=True)
    return (centred / found.std(1, correction=0, keepdim=True).clamp(min=least)).flatten().tolist()
