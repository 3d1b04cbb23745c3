"""ATLAS (arXiv 2504.01281): search where the model is unsure of a word that others rest on, for what it had in mind.

`Atlas` is a policy for `textkv.rag.dynamic`: the trigger says when (`textkv.rag.trigger`), representation pooling what
to ask (`textkv.rag.query`). The text is cut before the word that triggered. A word of several tokens is as sure as its
least sure token, has the sum of their attention and the mean of their change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from textkv.rag.dynamic import Draft, DynamicReader, Finding
from textkv.rag.query import BETA, WORDS, pick, relevance
from textkv.rag.trigger import Trigger
from textkv.rag.words import Word, words_in

QUANTILE = 0.0
"""Of the scores of unsure words: the gate has let the sure ones go already, and a search that was not made costs more
than one too many (SmolLM2, two-hop questions of seed 0: .38 of 24 are right at 0, .29 at .25)."""
_WRITE = "Write a short search query, in one line, from these words: {words}"


@dataclass
class Atlas:
    """The policy.

    Attributes:
        trigger: when.
        draft: tokens of a draft that the "received" reading looks back on; "outgoing" looks at every word.
        words: of a query (k, 5 to 7 in the paper).
        beta, normalize: see `textkv.rag.query.relevance`.
        writes: let the model write the query from these words, as the paper does; False = the words are the query,
            which is what BM25 wants and what a model of 135M cannot better.

    Raises:
        ValueError: a draft of fewer than 2 tokens.
    """

    trigger: Trigger
    draft: int = 16
    words: int = WORDS
    beta: float = BETA
    normalize: Literal["minmax", "none"] = "minmax"
    writes: bool = False

    def __post_init__(self) -> None:
        if self.draft < 2:
            raise ValueError(f"draft={self.draft}: no later token gives attention; use at least 2")

    @property
    def span(self) -> int:
        """Tokens between two looks."""
        return self.draft if self.trigger.mode == "received" else 0

    def look(self, draft: Draft, final: bool) -> Finding | None:
        """The first word of a draft that triggers, if one does; the word that may go on waits."""
        words = [word for word in draft.words() if word.start >= draft.settled]
        if not final:
            words = words[:-1]
        unsure = [word for word in words if word.telling and self._doubt(draft, word) > 1 - self.trigger.tau]
        weight = self.trigger.weight(draft.text.cache.kv_bytes())
        for word, score in zip(unsure, self._scores(draft, unsure), strict=True):
            draft.scores.append(score)
            if weight * score > self.trigger.theta and word.start >= draft.guarded:
                draft.settled = word.stop
                return Finding(word.start, self._query(draft, word))
        if words:
            draft.settled = words[-1].stop
        return None

    @staticmethod
    def _doubt(draft: Draft, word: Word) -> float:
        return 1 - min(draft.sure[place] for place in range(word.start, word.stop))

    def _scores(self, draft: Draft, words: Sequence[Word]) -> list[float]:
        """G D of each word, before alpha."""
        if not words:
            return []
        # What later tokens give is asked of all that were drafted; what a word gives, of itself.
        received = self.trigger.mode == "received"
        first = draft.settled if received else words[0].start
        places = list(range(first, len(draft.text.ids) if received else words[-1].stop))
        signal = self.trigger.signal(draft.text.rows(places))
        scores = []
        for word in words:
            own = slice(word.start - first, word.stop - first)
            made = self._doubt(draft, word) * signal.change[own].mean() * signal.focus[own].sum()
            scores.append(float(made))
        return scores

    def _query(self, draft: Draft, word: Word) -> str:
        """What the word was about: words of passages, question and answer before it; the question where none is."""
        text, at = draft.text, word.stop - 1
        known = [w for w in _told(draft, word.start) if w.telling]
        if not known:
            return draft.question
        scores = relevance(text.rows([at])[:, :, 0], text.pooled, text.pooled[at], known, self.beta, self.normalize)
        chosen = " ".join(pick(known, scores, self.words))
        return self._written(draft, chosen) if self.writes else chosen

    @staticmethod
    def _written(draft: Draft, words: str) -> str:
        """A query in the model's own words, or the words where it writes none."""
        reader = draft.text.reader
        ids = reader.encode(_WRITE.format(words=words))
        made = reader.decode(reader.empty(), ids, 3 * WORDS)
        said = reader.tokenizer.decode(made, skip_special_tokens=True).strip().partition("\n")[0]
        return said or words


def _told(draft: Draft, stop: int) -> list[Word]:
    """Words before place `stop` that belong to the text and not to its template."""
    text, made, first = draft.text, [], 0
    while first < stop:
        last = next((n for n in range(first, stop) if text.telling[n] != text.telling[first]), stop)
        if text.telling[first]:
            made += words_in(text.reader.tokenizer, text.ids[first:last], first)
        first = last
    return made


def calibrated(reader: DynamicReader, questions: Sequence[str], quantile: float = QUANTILE) -> float:
    """Theta: a quantile of the scores of unsure words in answers to `questions`, weighed as in an empty memory.

    Args:
        reader: with an `Atlas` whose theta is infinite, so that it only takes notes.

    Raises:
        ValueError: a quantile outside 0 to 1, or no word that was unsure.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile={quantile} is no share; use {QUANTILE}")
    scores = [score for question in questions for score in reader.ask(question).scores]
    if not scores:
        raise ValueError(f"no unsure word in {len(questions)} answers; give more questions, or a higher tau")
    return float(np.quantile(scores, quantile)) * reader.policy.trigger.weight(0)
