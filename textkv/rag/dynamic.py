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

from textkv.quoting import Quoting
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
        query = said if words_of(said) else draft.question
        return None if final else Finding(draft.settled, query)


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


@dataclass
class Desk:
    """What lies before the question: passages, read once, and what was searched for.

    Attributes:
        text: head and passages on their cache.
        read: tokens that were read for this answer, on any fork.
    """

    text: Watched
    index: Index | None
    each: int
    read: int
    passages: list[Passage] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)

    def search(self, query: str) -> bool:
        """Reads the best passages of a query that do not lie here yet; whether there are any."""
        self.queries.append(query)
        if self.index is None or not words_of(query):
            return False
        have = {passage.chunk for passage in self.passages}
        # The second fact of a chain is often the next best after the first, which is known.
        found = self.index.search(query, self.each + len(have))
        new = [passage for passage in found if passage.chunk not in have][: self.each]
        reader, pieces = self.text.reader, []
        for number, passage in enumerate(new, len(self.passages) + 1):
            pieces += [(plain_ids(reader, f"[{number}]"), False)]
            pieces += [(words_ids(reader, f" {passage.chunk.text}\n"), True)]
        before = len(self.text.ids)
        if new:
            read_pieces(self.text, pieces)
        self.read += len(self.text.ids) - before
        self.passages += new
        return bool(new)


def plain_ids(reader: Reader, text: str, special: bool = False) -> list[int]:
    """Token ids of a piece of text; `special` adds what begins a text."""
    return reader.tokenizer(text, add_special_tokens=special).input_ids


def words_ids(reader: Reader, text: str) -> list[int]:
    """Token ids of what a passage or a question says: it opens no turn."""
    return Quoting.of(reader.tokenizer, reader.tokenizer.chat_template).words(text)


def read_pieces(text: Watched, pieces: Sequence[tuple[list[int], bool]]) -> torch.Tensor:
    """Reads pieces (token ids, telling or not) in one forward: each forward reads all weights.

    Returns what `Watched.read` does.
    """
    ids = [token for piece, _ in pieces for token in piece]
    return text.read(ids, [telling for piece, telling in pieces for _ in piece])


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
        # A template writes the special tokens itself.
        head = plain_ids(reader, before + preamble, special=not (template and reader.tokenizer.chat_template))
        if head:
            self._head.read(head, telling=False)

    def ask(self, question: str) -> Answer:
        """An answer of greedy tokens.

        Raises:
            ValueError: a question without a word, or nothing found for it that an answer could rest on.
        """
        if not words_of(question):
            raise ValueError(f"query {question!r} has no word; ask with at least one")
        desk = Desk(self._head.fork(), self.index, self.limits.passages, len(self._head.ids))
        if self.index is not None and self.limits.first and not desk.search(question):
            raise ValueError(
                f"nothing in the index shares a word with {question!r}; ask otherwise, or index with vectors"
            )
        draft = self._begin(desk, question)
        tokens, scores = 0, []
        while True:
            before = len(draft.text.ids)
            finding = self._write(draft, len(desk.queries))
            tokens += len(draft.text.ids) - before
            if finding is None:
                break
            # Where nothing new is found the draft stands, and goes on.
            if desk.search(finding.query):
                scores += draft.scores
                draft = self._begin(desk, question, draft, finding.cut)
        text = self.reader.tokenizer.decode(draft.made, skip_special_tokens=True).strip()
        return Answer(
            text, tuple(desk.passages), cited_in(text, len(desk.passages)), desk.read, tokens, tuple(desk.queries),
            tuple(scores + draft.scores),
        )  # fmt: skip

    def _write(self, draft: Draft, searches: int) -> Finding | None:
        """Writes until the policy finds something or the answer is complete."""
        policy = self.policy if self.index is not None and searches < self.limits.searches else Never()
        while not draft.ended:
            draft.step(self.limits.most)
            if draft.ended or len(draft.text.ids) - draft.settled >= policy.span:
                finding = policy.look(draft, draft.ended)
                if finding is not None:
                    return finding
        return None

    def _begin(self, desk: Desk, question: str, before: Draft | None = None, cut: int = 0) -> Draft:
        """Reads the question, and what an earlier draft wrote before place `cut`, on a fork of what lies before."""
        text, reader = desk.text.fork(), self.reader
        pieces = [(plain_ids(reader, self._asked), False), (words_ids(reader, f" {question}"), True)]
        pieces += [(plain_ids(reader, self._end), False)]
        start, sure = len(text.ids) + sum(len(piece) for piece, _ in pieces), {}
        if before is not None and cut > before.start:
            kept = before.text.ids[before.start : cut]
            pieces += [(kept, True)]
            sure = {start + n: before.sure[before.start + n] for n in range(len(kept))}
        logits = read_pieces(text, pieces)
        place = len(text.ids)
        desk.read += place - len(desk.text.ids)
        # After the first search too: how an answer begins is always unsure, and what is found for that leads astray.
        guarded = place + (self.limits.guard if desk.queries else 0)
        return Draft(text, question, start, place, guarded, logits, sure, self.stop)
