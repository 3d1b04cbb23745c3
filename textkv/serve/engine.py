"""The engine of language models whose conversations keep their caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerationMode

from textkv.budgets import Budget
from textkv.cache import MethodCache
from textkv.conversation import Conversation
from textkv.method import resolve_method
from textkv.models.loading import load
from textkv.quoting import Quoting
from textkv.registry import Registry
from textkv.serve.answers import Answer
from textkv.serve.interface import Cancelled, Engine, Opening, Outcome
from textkv.serve.omitted import goes_on, restored
from textkv.serve.opening import AnswerOpening
from textkv.serve.protocol import ChatRequest, Message, too_long
from textkv.serve.rows import Ask, More, Row, read_next, step
from textkv.serve.shelf import Shelf
from textkv.serve.structured import Schemas
from textkv.serve.template import PLAIN
from textkv.serve.unread import check_template, check_text_model
from textkv.together import packs

_COLUMNS = ("input_ids", "attention_mask", "mm_token_type_ids")
DEFAULT = "full"  # method
ROWS = 16  # requests that are answered together
LONGEST = 2**31  # columns, where a model names no limit
COLDEST = 1e-4  # a temperature below takes the likeliest token: logits divided by it are beyond numbers of 16 bits


@dataclass(frozen=True)
class Prepared:
    """A request as tensors: `inputs` for `Conversation.generate`, the options of its decoding, its stop strings, and
    `stem`: columns up to which it will be told again by its next turn; None = up to the end of the answer. `owner`:
    whose it is.
    """

    inputs: dict[str, Any]
    options: dict[str, Any]
    stop: tuple[str, ...] = ()
    seed: int | None = None
    stem: int | None = None
    owner: str = ""


class ChatEngine(Engine):
    """A causal model with a chat template, text only.

    Args:
        model: in eval mode.
        tokenizer: its own, with a chat template.
        method, budget: as for `MethodCache`.
        memory: bytes that the conversations may hold between their turns; None = no limit.
        disk: folder for conversations that do not fit; None = they are dropped.
        host: bytes of the machine's memory for them, before they go to disk.
        answer_tokens: the longest answer where a request names no limit.
        chat_template: for a tokenizer that comes without one.
        rows: requests that are answered together; None = `ROWS`. A model that cannot read several texts at once
            answers in turn.

    Raises:
        ValueError: no chat template, or a method or budget that cannot be.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        method: str = "full",
        budget: Budget | float | str | None = None,
        memory: int | None = None,
        disk: Path | None = None,
        answer_tokens: int = 1024,
        chat_template: str | None = None,
        rows: int | None = None,
        host: int = 0,
    ) -> None:
        self.chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        check_template(self.chat_template)
        resolve_method(method, budget)
        self.model, self.tokenizer, self.answer_tokens = model, tokenizer, answer_tokens
        self.shelf = Shelf(
            lambda: Conversation(model, method, budget),
            lambda folder: Conversation.load(folder, model),
            memory,
            disk,
            host=host,
        )
        self._blank = self.shelf.new()
        rows = ROWS if rows is None else rows
        self.rows = rows if rows > 1 and self._draws() and packs(model, lambda: MethodCache(model)) else 1
        self._silent = special_ids(tokenizer)
        self._quoting = Quoting.of(tokenizer, self.chat_template)
        self._opening = AnswerOpening.of(tokenizer, self.chat_template)
        self._schemas = Schemas(tokenizer, model.config.get_text_config().vocab_size, self._ends())

    @classmethod
    def check(cls, opening: Opening) -> None:
        """See `Engine`."""
        if opening.method is None and opening.budget is not None:
            raise ValueError(f"--budget {opening.budget} without a method that keeps to it; give one: --method snapkv")
        resolve_method(opening.method or DEFAULT, opening.budget)
        check_text_model(opening, opening.method or DEFAULT)

    @classmethod
    def open(cls, opening: Opening) -> ChatEngine:
        """See `Engine`."""
        model, tokenizer = load(opening.model, opening.dtype, opening.device)
        template = opening.chat_template or (PLAIN if opening.model == "mini" else None)
        return cls(
            model,
            tokenizer,
            opening.method or DEFAULT,
            opening.budget,
            opening.memory,
            opening.disk,
            chat_template=template,
            rows=opening.rows,
            host=opening.host,
        )

    def prepare(self, request: ChatRequest) -> Prepared:
        """See `Engine`."""
        text = self.tokenizer.apply_chat_template(
            [self._text_message(m) for m in request.messages],
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
        ids = torch.tensor([self._quoting.ids(text)], device=self.model.device)
        return self.prepared(request, {"input_ids": ids})

    def _text_message(self, message: Message) -> dict[str, str]:
        parts = list(message.parts())
        if any(isinstance(part, bytes) for part in parts):
            raise ValueError("this model reads text only; send no pictures, or serve a vision-language model")
        # Newer clients call the system's turn the developer's; templates know the old name.
        role = "system" if message.role == "developer" else message.role
        return {"role": role, "content": self._quoting.quote("".join(parts), said=role == "assistant")}

    def prepared(self, request: ChatRequest, inputs: dict[str, Any]) -> Prepared:
        """Adds to a prompt's tensors what a request says of its decoding."""
        columns = inputs["input_ids"].shape[1]
        limit = self._limit
        if columns >= limit:
            raise too_long(columns, limit)
        options = sampling(request)
        options["max_new_tokens"] = min(request.max_tokens or self.answer_tokens, limit - columns)
        penalties = request.frequency_penalty or 0.0, request.presence_penalty or 0.0
        processors = [_Penalties(*penalties, columns)] if any(penalties) else []
        if request.schema_of_answer is not None:
            # Last: what a schema forbids stays forbidden.
            processors.append(self._schemas.processor(request.schema_of_answer, columns))
        if processors:
            options["logits_processor"] = LogitsProcessorList(processors)
        stem = self._opening.before(inputs["input_ids"])
        return Prepared(inputs, options, tuple(request.stop), request.seed, stem, request.owner)

    def answer(self, prepared: Prepared, give: Callable[[str], None], cancelled: Callable[[], bool]) -> Outcome:
        """See `Engine`."""
        if cancelled():
            raise Cancelled
        ids = prepared.inputs["input_ids"]
        # An error leaves the conversation half-way: it is not put back, and its next turn reads it anew.
        talk, inputs, moved = self._begun(prepared)
        columns = inputs["input_ids"].shape[1]
        # A client's text is never padding, also where it begins with the token that others pad with.
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        growing = _Growing(self._words(prepared.stop), give, cancelled, columns)
        with torch.random.fork_rng(enabled=prepared.seed is not None):
            if prepared.seed is not None:
                torch.manual_seed(prepared.seed)
            read, kept = self._stem(talk, inputs, prepared.stem and prepared.stem + moved)
            out = talk.generate(**inputs, **prepared.options, stopping_criteria=StoppingCriteriaList([growing]))
        # Also when the client has gone: it may ask again, and the prompt was read.
        self.shelf.put(kept or talk, prepared.owner)
        if growing.left:
            raise Cancelled
        growing.finish()
        new = out[0, columns:].tolist()
        ended = growing.answer.stopped or (bool(new) and new[-1] in self._ends())
        cached = ids.shape[1] - read - talk.last.read
        return Outcome(growing.text, "stop" if ended else "length", ids.shape[1], cached, len(new))

    def joins(self, prepared: Prepared) -> bool:
        """See `Engine`: all, where the model reads several texts in one forward as it reads each alone."""
        return self.rows > 1

    def answer_rows(self, more: More) -> None:
        """See `Engine`, and `textkv.serve.rows`. A client that goes away frees its row within one step."""
        rows: list[_Asked] = []
        while True:
            joined = (self._joined(ask) for ask in more(self.rows - len(rows)))
            rows += [row for row in joined if row is not None]
            if not rows:
                return
            step(self.model, read_next(rows))
            for row in [row for row in rows if row.over or row.error is not None]:
                rows.remove(row)
                row.ask.done(self._ended(row))

    def _joined(self, ask: Ask) -> _Asked | None:
        """A request as a row; None if it is over already."""
        try:
            if ask.cancelled():
                raise Cancelled
            return self._row(ask)
        except Exception as error:
            ask.done(error)
            return None

    def _row(self, ask: Ask) -> _Asked:
        prepared = ask.prepared
        talk, inputs, moved = self._begun(prepared)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        read, kept = self._stem(talk, inputs, prepared.stem and prepared.stem + moved)
        columns = inputs["input_ids"].shape[1]
        growing = _Growing(self._words(prepared.stop), ask.give, ask.cancelled, columns)
        row = _Asked(talk, inputs, prepared.options, growing, prepared.seed)
        row.ask, row.kept, row.cached = ask, kept, columns - moved - read - talk.last.read
        return row

    def _ended(self, row: _Asked) -> Outcome | Exception:
        """The end of a row; its conversation is kept, unless an error left it half-way."""
        try:
            if row.error is not None:
                raise row.error
            row.talk.end_turn(row.told, row.ids)
            self.shelf.put(row.kept or row.talk, row.ask.prepared.owner)
            if row.growing.left:
                raise Cancelled
            row.growing.finish()
        except Exception as error:  # of this row: those beside it go on
            return error
        ended = "stop" if row.ended or row.growing.answer.stopped else "length"
        prompt = row.ask.prepared.inputs["input_ids"].shape[1]
        return Outcome(row.growing.text, ended, prompt, row.cached, row.tokens)

    def _begun(self, prepared: Prepared) -> tuple[Conversation, dict[str, Any], int]:
        """The conversation that a request goes on from, the request in its columns, and by how many these moved."""
        ids = prepared.inputs["input_ids"]
        compared = {k: v for k, v in prepared.inputs.items() if k not in ("spans", "grids")}
        told = self._blank.dialogue(**({"attention_mask": torch.ones_like(ids)} | compared))
        talk = self.shelf.take(told, prepared.owner)
        found = goes_on(talk, told)
        if found is None or not found.left_out:
            return talk, dict(prepared.inputs), 0
        inputs, moved = restored(prepared.inputs, talk.seen, told, found)
        if inputs["input_ids"].shape[1] + prepared.options["max_new_tokens"] > self._limit:
            # What was left out still counts in positions, and these have come to their end.
            self.shelf.stats.dropped += 1
            return self.shelf.new(), dict(prepared.inputs), 0
        gone = talk.forgotten
        talk.cache.forget([[run for run in found.left_out if not gone[slice(*run)].all()]])
        return talk, inputs, moved

    def _stem(self, talk: Conversation, inputs: dict[str, Any], stem: int | None) -> tuple[int, Conversation | None]:
        """Reads a prompt up to its generation prompt: how many columns that were, and a copy to go on from."""
        if stem is None or stem < talk.cache.tokens_seen:
            return 0, None
        if stem == talk.cache.tokens_seen:
            return 0, talk.fork()
        cut = {k: v[:, :stem] if k in _COLUMNS else v for k, v in inputs.items()}
        # The one token that is drawn is never read.
        talk.generate(**cut, max_new_tokens=1, do_sample=False)
        read = talk.last.read
        if "image_grid_thw" in inputs:
            images = len(inputs["image_grid_thw"])
            inputs["pixel_values"], inputs["known_images"] = None, images
        return read, talk.fork()

    def figures(self) -> Mapping[str, float]:
        """See `Engine`."""
        held = {
            "kv_bytes": self.shelf.kv_bytes(),
            "kv_bytes_peak": self.shelf.peak_bytes,
            "host_bytes": self.shelf.host_bytes(),
            "disk_bytes": self.shelf.disk_bytes(),
        }
        return (
            held
            | {"conversations": len(self.shelf)}
            | {f"conversations_{name}_total": value for name, value in vars(self.shelf.stats).items()}
        )

    def close(self) -> None:
        """See `Engine`."""
        self.shelf.close()

    @property
    def _limit(self) -> int:
        """Columns that the model reads at most."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or LONGEST

    def _words(self, stop: Sequence[str] = ()) -> Answer:
        """An answer that begins."""
        return Answer(self._text, stop, self._silent)

    def _text(self, ids: Sequence[int]) -> str:
        """The text of a whole answer."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _draws(self) -> bool:
        """Whether the model takes one token after the other, the likeliest or by chance, and nothing else."""
        return self.model.generation_config.get_generation_mode() in (
            GenerationMode.GREEDY_SEARCH,
            GenerationMode.SAMPLE,
        )

    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        return [] if ends is None else ends if isinstance(ends, list) else [ends]


class _Asked(Row):
    """A row and whose it is: the conversation that is kept in its place, and tokens that were not read again."""

    ask: Ask
    kept: Conversation | None
    cached: int


ENGINES = Registry("engine", "agentkv.engines", "textkv.serve.interface.Engine", own=("open", "prepare", "answer"))
"""Engines by name. Wings add theirs by entry points, so that a server serves what is installed."""
ENGINES["text"] = ChatEngine


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that a decoder leaves out with `skip_special_tokens`."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = (number for number, token in added.items() if token.special)
    return frozenset([*getattr(tokenizer, "all_special_ids", ()), *marked])


def sampling(request: ChatRequest) -> dict[str, Any]:
    """`model.generate`'s options for a request's temperature and top_p; what is None stays the model's own."""
    if request.temperature is not None and request.temperature < COLDEST:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    told = {"temperature": request.temperature, "top_p": request.top_p}
    told = {name: value for name, value in told.items() if value is not None}
    return {"do_sample": True, **told} if told else {}


@dataclass
class _Growing(StoppingCriteria):
    """Hears every token of a generation, and ends it for a stop string or a client that has gone."""

    answer: Answer
    give: Callable[[str], None]
    cancelled: Callable[[], bool]
    seen: int  # columns that were heard of
    text: str = ""
    left: bool = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **ignored: Any) -> torch.Tensor:
        stopped = self.hear(input_ids[0, self.seen :].tolist())
        self.seen = input_ids.shape[1]
        return torch.tensor([self.left or stopped], device=input_ids.device)

    def hear(self, tokens: Sequence[int]) -> bool:
        """Takes tokens; whether a stop string has come."""
        for token in tokens:
            self._give(self.answer.add(token))
        self.left = self.cancelled()
        return self.answer.stopped

    def finish(self) -> None:
        """Gives what was held back."""
        self._give(self.answer.end())

    def _give(self, text: str) -> None:
        if text:
            self.text += text
            self.give(text)


@dataclass
class _Penalties(LogitsProcessor):
    """OpenAI's penalties: for every token of the answer so far, `often` times its count and `once` off its logit."""

    often: float
    once: float
    prompt: int  # columns of the prompt, which do not count

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.zeros_like(scores)
        said = input_ids[:, self.prompt :]
        counts.scatter_add_(1, said, torch.ones_like(said, dtype=scores.dtype))
        return scores - self.often * counts - self.once * (counts > 0)
