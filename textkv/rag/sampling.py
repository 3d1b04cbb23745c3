"""Several answers to one prompt that is read once: each goes on from a fork of the prefix cache.

Self-consistency and best-of-n of arXiv 2504.01281, appendix D.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

import torch

from textkv.cache import MethodCache
from textkv.rag.answer import Reader

ALIKE = 0.8  # of the characters of two answers, which then say the same


class Prefix:
    """A prompt that has been read.

    Attributes:
        prefill_tokens: read as a prompt; answers add none.
    """

    def __init__(self, reader: Reader, prompt: str) -> None:
        ids = reader.encode(prompt)
        self._reader, self._cache = reader, reader.empty()
        self._logits = self._next(ids, self._cache)
        self.prefill_tokens: int = ids.shape[1]

    def sample(self, temperature: float = 1.0, most: int = 48, seed: int = 0) -> str:
        """One answer of at most `most` tokens; temperature 0 takes the likeliest token.

        Raises:
            ValueError: a temperature below 0.
        """
        if temperature < 0:
            raise ValueError(f"temperature={temperature} is below 0; use 0 for the likeliest token")
        draw = torch.Generator().manual_seed(seed)
        cache, logits, made = self._cache.fork(), self._logits, []
        while True:
            token = _pick(logits, temperature, draw)
            if token in self._reader.ends:
                break
            made.append(token)
            # The last token's own logits are asked for by nobody.
            if len(made) >= most:
                break
            logits = self._next(torch.tensor([[token]], device=self._reader.model.device), cache)
        return self._reader.tokenizer.decode(made, skip_special_tokens=True).strip()

    def branches(self, k: int = 10, most: int = 48) -> list[tuple[str, float]]:
        """The answers that begin with each of the k likeliest first tokens and go on greedily, likeliest first, and how
        sure each is: the mean over its tokens of the likeliest token's probability less the second's.

        Raises:
            ValueError: k below 1.
        """
        if k < 1:
            raise ValueError(f"k={k}: at least 1 branch must be followed")
        return [self._branch(first, most) for first in self._logits.topk(min(k, len(self._logits))).indices.tolist()]

    def _branch(self, token: int, most: int) -> tuple[str, float]:
        cache, logits, made, margins = self._cache.fork(), self._logits, [], []
        while True:
            best, second = logits.softmax(-1).topk(2).values.tolist()
            margins.append(best - second)
            if token in self._reader.ends:
                break
            made.append(token)
            if len(made) >= most:
                break
            logits = self._next(torch.tensor([[token]], device=self._reader.model.device), cache)
            token = int(logits.argmax())
        text = self._reader.tokenizer.decode(made, skip_special_tokens=True).strip()
        return text, sum(margins) / len(margins)

    @torch.inference_mode()
    def _next(self, ids: torch.Tensor, cache: MethodCache) -> torch.Tensor:
        return self._reader.model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1].float().cpu()


def samples(prefix: Prefix, n: int, temperature: float = 1.0, most: int = 48, seed: int = 0) -> list[str]:
    """n answers, with the seeds seed, seed + 1, ..

    Raises:
        ValueError: n below 1.
    """
    if n < 1:
        raise ValueError(f"n={n}: at least 1 answer must be drawn")
    return [prefix.sample(temperature, most, seed + number) for number in range(n)]


def alike(one: str, other: str, least: float = ALIKE) -> bool:
    """Whether two answers have at least that ratio of matching characters."""
    return SequenceMatcher(None, one, other).ratio() >= least


def self_consistent(answers: Sequence[str], least: float = ALIKE) -> str:
    """The first member of the largest cluster; an answer joins the first cluster whose first member is `alike` to it.
    Ties go to the earlier cluster.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("0 answers agree on nothing; give at least 1")
    clusters: list[list[str]] = []
    for answer in answers:
        near = (c for c in clusters if alike(c[0], answer, least))
        home = next(near, None)
        if home is None:
            clusters.append([answer])
        else:
            home.append(answer)
    return max(clusters, key=len)[0]


def best_of(answers: Sequence[str], rate: Callable[[str], float]) -> str:
    """The answer with the highest rating, the earlier one of equals; a rating that is no number (NaN) comes last.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("0 answers have no best; give at least 1")
    rated = [(rate(answer), answer) for answer in answers]
    return max(rated, key=lambda pair: pair[0] if pair[0] == pair[0] else float("-inf"))[1]


def _pick(logits: torch.Tensor, temperature: float, draw: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=draw))
