"""An answer that is written and searched for in turns: a policy says when to search again, and for what.

    [head][passages, more of them after each search] | [question][answer so far]

All that stands before the bar is read once. A search forks nothing and loses nothing of it: the new passages are read
behind the old ones, and only the question and the answer so far are read again, on a fork.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from textkv.rag.answer import ASKED, Answer, Reader, chat, cited_in
from textkv.rag.index import Index, Passage, words_of
from textkv.rag.watched import Watched
from textkv.rag.words import Word, words_in

_HERE, _THERE = "{passages}", "{question}"


@dataclass(frozen=True)
class Finding:
    """What a policy found in a draft: drop the tokens from place `cut` on, and search for `query`."""

    cut: int
    query: str


@dataclass
class Draft:
    """An answer that is being written.

    Attributes:
        text: all that was read, the answer last; what is written is read at once.
        start: place of the answer's first token.
        settled: the policy has looked at what stands before this place.
        guarded: nothing before this place triggers: it was written right after a search.
        sure: the probability of each token of the answer, by place.
        scores: what the policy noted of the words that it looked at.
    """

    text: Watched
    question: str
    start: int
    settled: int
    guarded: int
    logits: torch.Tensor
    sure: dict[int, float]
    stop: str = ""
    scores: list[float] = field(default_factory=list)
    ended: bool = False

    @property
    def made(self) -> list[int]:
        """Token ids of the answer so far."""
        return self.text.ids[self.start :]

    def words(self) -> list[Word]:
        """Words of the answer so far, by place; the last one may go on."""
        return words_in(self.text.reader.tokenizer, self.made, self.start)

    def step(self, most: int) -> None:
        """Writes one token more, the likeliest, or ends."""
        chances = self.logits.softmax(-1)
        token = int(chances.argmax())
        tokenizer = self.text.reader.tokenizer
        stopped = bool(self.stop) and self.stop in tokenizer.decode([token])
        if token in self.text.reader.ends or stopped or len(self.made) >= most:
            self.ended = True
            return
        self.sure[len(self.text.ids)] = float(chances[token])
        self.logits = self.text.read([token])


class Policy(Protocol):
    """When to search again. `span`: tokens between two looks; 0 = at the end of every word."""

    span: int

    def look(self, draft: Draft, final: bool) -> Finding | None:
        """What to do about a draft; `final`: it is complete. Moves `draft.settled` on."""
        ...


class Never:
    """One search, before anything is written."""

    span = 1 << 30

    def look(self, draft: Draft, final: bool) -> None:
        """Nothing."""


@dataclass
class Interval:
    """A search after every `span` tokens, for the words of these; what is written stays.

    Raises:
        ValueError: a span below 1.
    """

    span: int = 16

    def __post_init__(self) -> None:
        if self.span < 1:
            raise ValueError(f"span={self.span}: at least 1 token lies between two searches; use 16")

    def look(self, draft: Draft, final: bool) -> Finding | None:
        """The tokens since the last look, as a query."""
        said = draft.text.reader.tokenizer.decode(draft.text.ids[draft.settled :])
        draft.settled = len(draft.text.ids)
        return None if final else Finding(draft.settled, said)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far an answer may go.

    Attributes:
        passages: of one search; those that are read already are not read again.
        most: tokens of the answer.
        searches: in one answer, the first included.
        guard: tokens after a search in which no other is triggered.
        first: whether the question is searched for before anything is written.

    Raises:
        ValueError: a number below 1, or a guard below 0.
    """

    passages: int = 3
    most: int = 48
    searches: int = 5
    guard: int = 4
    first: bool = True

    def __post_init__(self) -> None:
        if min(self.passages, self.most, self.searches) < 1 or self.guard < 0:
            raise ValueError(
                f"passages={self.passages}, most={self.most}, searches={self.searches} are at least 1, "
                f"guard={self.guard} at least 0"
            )


class DynamicReader:
    """Answers with as many searches as a policy wants.

    Args:
        preamble: text before the passages, examples for instance; it is read once for all answers.
        asked: what is asked for, between passages and question.
        begun: the answer as the prompt begins it.
        template: whether the prompt stands in the model's chat template, where it has one.
        stop: text that ends an answer, e.g. a new line; "" = only the end token and the limit do.
    """

    def __init__(
        self,
        reader: Reader,
        index: Index | None,
        policy: Policy,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        preamble: str = "",
        asked: str = ASKED,
        begun: str = "",
        template: bool = True,
        stop: str = "",
    ) -> None:
        self.reader, self.index, self.policy, self.limits, self.stop = reader, index, policy, limits, stop
        plain = f"{_HERE}\n{asked}\nQuestion:{_THERE}" if asked else f"{_HERE}Question:{_THERE}"
        whole = (chat(reader.tokenizer, plain) if template else plain + "\n") + begun
        before, _, after = whole.partition(_HERE)
        self._asked, _, self._end = after.partition(_THERE)
        self._head = Watched.empty(reader)
        self._head_tokens = self._ids(before + preamble, special=not (template and reader.tokenizer.chat_template))
        if self._head_tokens:
            self._head.read(self._head_tokens, telling=False)

    def ask(self, question: str) -> Answer:
        """An answer of greedy tokens.

        Raises:
            ValueError: a question without a word, or nothing found for it that an answer could rest on.
        """
        if not words_of(question):
            raise ValueError(f"query {question!r} has no word; ask with at least one")
        base, passages, queries = self._head.fork(), [], []
        prefill = len(self._head_tokens)
        searching = self.index is not None
        if searching and self.limits.first:
            queries.append(question)
            passages, read = self._search(base, question, passages)
            prefill += read
            if not passages:
                raise ValueError(
                    f"nothing in the index shares a word with {question!r}; ask otherwise, or index with vectors"
                )
        draft = self._begin(base, question, [], {})
        prefill, tokens, scores = prefill + draft.start - len(base.ids), 0, []
        while True:
            before = len(draft.text.ids)
            finding = self._write(draft, searching and len(queries) < self.limits.searches)
            tokens += len(draft.text.ids) - before
            if finding is None:
                break
            queries.append(finding.query)
            more, read = self._search(base, finding.query, passages)
            # What was found is known already: the draft stands, and is not looked at twice.
            if len(more) == len(passages):
                continue
            passages, prefill = more, prefill + read
            scores += draft.scores
            kept = draft.text.ids[draft.start : finding.cut]
            sure = [draft.sure[draft.start + n] for n in range(len(kept))]
            draft = self._begin(base, question, kept, dict(enumerate(sure)))
            prefill += len(draft.text.ids) - len(base.ids)
        text = self.reader.tokenizer.decode(draft.made, skip_special_tokens=True).strip()
        found = tuple(passages)
        return Answer(
            text, found, cited_in(text, len(found)), prefill, tokens, tuple(queries), tuple(scores + draft.scores)
        )

    def _write(self, draft: Draft, searching: bool) -> Finding | None:
        """Writes until the policy finds something or the answer is complete."""
        policy = self.policy if searching else Never()
        while not draft.ended:
            draft.step(self.limits.most)
            whole = draft.ended
            if whole or len(draft.text.ids) - draft.settled >= policy.span:
                finding = policy.look(draft, whole)
                if finding is not None:
                    return finding
        return None

    def _begin(self, base: Watched, question: str, kept: Sequence[int], sure: dict[int, float]) -> Draft:
        """Reads the question and what is kept of an answer, on a fork of what stands before them."""
        text = base.fork()
        text.read(self._ids(self._asked), telling=False)
        text.read(self._ids(f" {question}"))
        logits = text.read(self._ids(self._end), telling=False) if self._end else None
        start = len(text.ids)
        if kept:
            logits = text.read(list(kept))
        if logits is None:
            raise ValueError("the chat template puts nothing between a question and its answer; give begun='Answer:'")
        place = len(text.ids)
        guarded = place + self.limits.guard if kept or sure else place
        sure = {start + n: chance for n, chance in sure.items()}
        return Draft(text, question, start, place, guarded, logits, sure, self.stop)

    def _search(self, base: Watched, query: str, known: list[Passage]) -> tuple[list[Passage], int]:
        """The passages known and those that are new for a query, which are read; (all of them, tokens read)."""
        if not words_of(query):
            return known, 0
        have = {passage.chunk for passage in known}
        new = [p for p in self.index.search(query, self.limits.passages) if p.chunk not in have]
        read = 0
        for number, passage in enumerate(new, len(known) + 1):
            sign, line = self._ids(f"[{number}]"), self._ids(f" {passage.chunk.text}\n")
            base.read(sign, telling=False)
            base.read(line)
            read += len(sign) + len(line)
        return known + new, read

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return self.reader.tokenizer(text, add_special_tokens=special).input_ids
