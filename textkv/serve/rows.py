"""Requests that are answered together: each forward reads what is new of all of them, every one on its own cache.

A row joins between two steps, with its prompt, and leaves when it is over; nobody waits for anybody's end. Attention,
the method and the drawing of tokens are each row's own, so that it keeps and says what it keeps and says alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import EosTokenCriteria, LogitsProcessorList, MaxLengthCriteria, PreTrainedModel, StoppingCriteriaList

from textkv.conversation import Conversation
from textkv.dialogue import Dialogue
from textkv.together import AXES, New, forward

READ = 2048
"""New tokens of prompts that one forward reads, more only for a single prompt: those who decode wait for it."""


@dataclass(frozen=True)
class Ask:
    """A request that wants an answer: `prepared` for the engine, who hears its texts, whether its client has gone, and
    who hears its Outcome, or the exception that ended it.
    """

    prepared: Any
    give: Callable[[str], None]
    cancelled: Callable[[], bool]
    done: Callable[[Any], None]


More = Callable[[int], list[Ask]]
"""Who wants to join now, so many at most."""


class Hears(Protocol):
    """Who hears the tokens of a row."""

    left: bool

    def hear(self, tokens: Sequence[int]) -> bool:
        """Takes tokens; whether the answer has come to an end by what it says."""


class Row:
    """One conversation among those that are answered together.

    Args:
        talk: the conversation.
        inputs: its whole dialogue, as for `Conversation.begin_turn`.
        options: for `model.generate`, which says by them how tokens are drawn and what ends an answer.
        growing: who hears each token.
        seed: of what is drawn by chance; None = as it comes.

    Attributes:
        ids: with the answer so far.
        new: what the model has to read next.
        over: whether the answer has ended, by itself (`ended`) or not.
        error: what has ended it instead.
    """

    def __init__(
        self,
        talk: Conversation,
        inputs: dict[str, Any],
        options: dict[str, Any],
        growing: Hears,
        seed: int | None = None,
    ) -> None:
        self.ids: torch.Tensor = inputs["input_ids"]
        self.talk, self.growing, self.prompt = talk, growing, self.ids.shape[1]
        self._told, inputs = talk.begin_turn(**inputs)
        self._plan = _Plan()
        talk.model.generate(**inputs, past_key_values=talk.cache, custom_generate=self._plan, **options)
        places, unread = inputs.get("position_ids"), slice(talk.cache.tokens_seen, None)
        pictures = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
        self.new = New(talk.cache, self.ids[:, unread], None if places is None else places[:, 0, unread], pictures)
        # Behind what is shown each token is one further, on every axis.
        self._next = None if places is None else places[1:].amax() + 1
        self.over = self.ended = False
        self.error: Exception | None = None
        self._dice = None if seed is None else torch.Generator(talk.model.device).manual_seed(seed)

    @property
    def tokens(self) -> int:
        """Tokens of the answer so far."""
        return self.ids.shape[1] - self.prompt

    @property
    def told(self) -> Dialogue:
        """The prompt, for `Conversation.end_turn`."""
        return self._told

    def take(self, logits: torch.Tensor) -> None:
        """Draws the next token, by logits fp32 [1, vocabulary], and tells of it."""
        plan = self._plan
        scores = plan.processors(self.ids, logits)
        if plan.draws:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self._dice)
        else:
            token = scores.argmax(-1, keepdim=True)
        places = None
        if self._next is not None:
            order = self._next.new_full((1, 1), self.ids.shape[1])
            places, self._next = torch.cat([order, self._next.expand(AXES - 1, 1)]), self._next + 1
        self.ids, self.new = torch.cat([self.ids, token], 1), New(self.talk.cache, token, places)
        said = self.growing.hear(token[0].tolist())
        self.ended = said or int(token) in plan.ends or any(bool(other(self.ids, scores)) for other in plan.others)
        self.over = self.ended or self.growing.left or self.ids.shape[1] >= plan.longest


@dataclass
class _Plan:
    """In place of `model.generate`'s own loop: learns what it would go by, and generates nothing."""

    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    draws: bool = False
    ends: frozenset[int] = frozenset()
    longest: int = 0
    others: list[Any] = field(default_factory=list)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        **ignored: Any,
    ) -> torch.Tensor:
        self.processors, self.draws = logits_processor, generation_config.do_sample
        for one in stopping_criteria:
            if isinstance(one, MaxLengthCriteria):
                self.longest = one.max_length
            elif isinstance(one, EosTokenCriteria):
                self.ends = frozenset(one.eos_token_id.tolist())
            else:
                self.others.append(one)
        return input_ids


def step(model: PreTrainedModel, rows: Sequence[Row]) -> None:
    """Reads what is new of the rows, and draws a token for each; what goes wrong is that row's `error`."""
    try:
        logits = forward(model, [row.new for row in rows])
    except Exception as error:
        if len(rows) > 1:
            # Which of them it was shows when each is read alone; what the others had read is taken back there.
            for row in rows:
                step(model, [row])
        else:
            rows[0].error = error
        return
    for number, row in enumerate(rows):
        try:
            row.take(logits[number : number + 1])
        except Exception as error:  # of this row: a schema that cannot go on, a client that cannot be told
            row.error = error


def read_next(rows: Sequence[Row]) -> list[Row]:
    """Those of the rows that the next forward reads: all that decode, and prompts as far as there is room."""
    found, room = [], READ
    for row in rows:
        columns = row.new.ids.shape[1] if not row.tokens else 0
        if columns <= room or (columns and room == READ):
            found.append(row)
            room -= columns
    return found
