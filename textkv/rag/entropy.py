"""Entropy-guided decoding: how freely the next token is drawn follows from how unsure the model is of it.

    T = T0 (1 + 0.3 (H + V) + 0.2 (Ha + Va) - 0.2 al)        top-p = 0.9 (1 + 0.1 Va)
    top-k = k0 (1 + 0.3 ga - 0.2 al)                         min-p = 0.03 (1 - 0.5 (H + V))

(arXiv 2504.01281, equations 44 to 54; where they have no constants, those of optillm, whose rule it is.) H and V are
entropy and varentropy of the next token in bits; of the last token's attention in the last layer, Ha is the entropy,
Va its variance over heads, al = mean |A_h - mean_h A| and ga = mean |log A|. H + V comes to ten bits and more, so T is
held below a maximum of ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from textkv.rag.answer import Reader
from textkv.rag.watched import Watched

HOTTEST = 1.5
"""Highest temperature; as printed there is none, and ten bits would make it 3."""


@dataclass(frozen=True)
class Unsure:
    """H, V, Ha, Va, al and ga of one token that is to be drawn."""

    entropy: float
    varentropy: float
    attention_entropy: float
    attention_varentropy: float
    agreement: float
    interaction: float

    @classmethod
    def of(cls, logits: Tensor, row: Tensor) -> Unsure:
        """From logits [vocabulary] and the last token's attention in the last layer, [heads, tokens]."""
        chances = logits.double().softmax(-1)
        bits = -chances.clamp(min=1e-300).log2()
        entropy = float((chances * bits).sum())
        varentropy = float((chances * (bits - entropy) ** 2).sum())
        row = row[:, (row > 0).any(0)].double()  # a token that was evicted has no column
        of_heads = -(row * row.clamp(min=1e-10).log2()).sum(-1)
        return cls(
            entropy, varentropy, float(of_heads.mean()), float(of_heads.var(correction=0)),
            float((row - row.mean(0)).abs().mean()), float(row.clamp(min=1e-10).log().abs().mean()),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How a token is drawn.

    Attributes:
        temperature: 0 = the likeliest token.
        top_p, top_k, min_p: the usual three; min_p is a share of the likeliest token's probability.

    Raises:
        ValueError: a figure out of its range.
    """

    temperature: float = 0.666
    top_p: float = 0.9
    top_k: int = 27
    min_p: float = 0.03

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= 1 and 0 <= self.min_p < 1):
            raise ValueError(f"{self} is no way to draw; use temperature >= 0, top_p and min_p in 0 to 1, top_k >= 1")

    def at(self, unsure: Unsure) -> Drawing:
        """The same as a base, for a token that the model is so unsure of."""
        doubt = unsure.entropy + unsure.varentropy
        attention = unsure.attention_entropy + unsure.attention_varentropy
        heat = self.temperature * (1 + 0.3 * doubt + 0.2 * attention - 0.2 * unsure.agreement)
        return Drawing(
            temperature=min(max(heat, 0.0), HOTTEST),
            top_p=min(max(self.top_p * (1 + 0.1 * unsure.attention_varentropy), 0.1), 1.0),
            top_k=min(max(round(self.top_k * (1 + 0.3 * unsure.interaction - 0.2 * unsure.agreement)), 1), 100),
            min_p=min(max(self.min_p * (1 - 0.5 * doubt), 0.01), 0.5),
        )

    def draw(self, logits: Tensor, generator: torch.Generator, draws: int = 5) -> int:
        """A token of logits [vocabulary]: the likeliest of `draws` (5 in optillm; 1 is plain drawing)."""
        if self.temperature == 0:
            return int(logits.argmax())
        chances, order = (logits.float() / self.temperature).softmax(-1).sort(descending=True)
        before = chances.cumsum(0) - chances
        kept = (before < self.top_p) & (chances >= self.min_p * chances[0])
        kept[self.top_k :] = False
        drawn = torch.multinomial(chances * kept, draws, replacement=True, generator=generator)
        return int(order[drawn.min()])  # they are sorted


class GuidedPrefix:
    """A prompt that is read once; every answer goes on from a fork of its cache, and sees what its tokens attend to.

    Raises:
        ValueError: a cache whose keys do not keep their positions (see `Watched.empty`).
    """

    def __init__(self, reader: Reader, prompt: str) -> None:
        ids = reader.encode(prompt)[0].tolist()
        self._text = Watched.empty(reader)
        if ids[:-1]:
            self._text.read(ids[:-1])
        # Only tokens that are read one by one have rows.
        self._logits = self._text.read(ids[-1:])
        self.prefill_tokens: int = len(ids)

    def sample(self, base: Drawing = Drawing(), most: int = 48, seed: int = 0, draws: int = 5) -> str:  # noqa: B008
        """One answer of at most `most` tokens; a base of temperature 0 is greedy.

        Raises:
            ValueError: fewer than 1 draw of a token.
        """
        if draws < 1:
            raise ValueError(f"draws={draws}: a token is drawn at least once")
        text, logits, generator = self._text.fork(), self._logits, torch.Generator().manual_seed(seed)
        first, reader = len(text.ids), text.reader
        while len(text.ids) - first < most:
            unsure = Unsure.of(logits, text.rows([len(text.ids) - 1])[-1, :, 0].cpu())
            token = base.at(unsure).draw(logits, generator, draws)
            if token in reader.ends:
                break
            logits = text.read([token])
        return reader.tokenizer.decode(text.ids[first:], skip_special_tokens=True).strip()
