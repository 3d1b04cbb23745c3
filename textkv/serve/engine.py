"""The engine of language models whose conversations keep their caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from textkv.budgets import Budget
from textkv.conversation import Conversation
from textkv.method import resolve_method
from textkv.models.loading import load
from textkv.registry import Registry
from textkv.serve.answers import Answer
from textkv.serve.interface import Cancelled, Engine, Opening, Outcome
from textkv.serve.omitted import goes_on, restored
from textkv.serve.opening import AnswerOpening
from textkv.serve.protocol import ChatRequest, Message
from textkv.serve.rows import Done, Row, Rows, padded, stands_alone
from textkv.serve.shelf import Shelf
from textkv.serve.structured import Schemas
from textkv.serve.template import PLAIN

_COLUMNS = ("input_ids", "attention_mask", "mm_token_type_ids")
LONGEST = 2**31  # columns, where a model names no limit
COLDEST = 1e-4  # a temperature below takes the likeliest token: logits divided by it are beyond numbers of 16 bits


@dataclass(frozen=True)
class Prepared:
    """A request as tensors: `inputs` for `Conversation.generate`, the options of its decoding, its stop strings, and
    `stem`: columns up to which it will be told again by its next turn; None = up to the end of the answer. `first`:
    nothing was answered yet in its conversation. `owner`: whose it is.
    """

    inputs: dict[str, Any]
    options: dict[str, Any]
    stop: tuple[str, ...] = ()
    seed: int | None = None
    stem: int | None = None
    first: bool = False
    owner: str = ""


class ChatEngine(Engine):
    """A causal model with a chat template, text only.

    Args:
        model: in eval mode.
        tokenizer: its own, with a chat template.
        method, budget: as for `MethodCache`.
        memory: bytes that the conversations may hold between their turns; None = no limit.
        disk: folder for conversations that do not fit; None = they are dropped.
        answer_tokens: the longest answer where a request names no limit.
        chat_template: for a tokenizer that comes without one.
        rows: first questions that are answered together, if they wait together; such a conversation is kept from its
            second question on.

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
        rows: int = 1,
    ) -> None:
        self.rows = rows
        self.chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        if not self.chat_template:
            raise ValueError(
                "the tokenizer has no chat template, so messages cannot be told; give one: --chat-template FILE"
            )
        resolve_method(method, budget)
        self.model, self.tokenizer, self.answer_tokens = model, tokenizer, answer_tokens
        self.shelf = Shelf(
            lambda: Conversation(model, method, budget), lambda folder: Conversation.load(folder, model), memory, disk
        )
        self._blank = self.shelf.new()
        self._silent = special_ids(tokenizer)
        self._opening = AnswerOpening.of(tokenizer, self.chat_template)
        self._schemas = Schemas(tokenizer, model.config.get_text_config().vocab_size, self._ends())

    @classmethod
    def open(cls, opening: Opening) -> ChatEngine:
        """See `Engine`."""
        method = opening.method or "full"
        resolve_method(method, opening.budget)
        model, tokenizer = load(opening.model, opening.dtype, opening.device)
        template = opening.chat_template or (PLAIN if opening.model == "mini" else None)
        return cls(
            model,
            tokenizer,
            method,
            opening.budget,
            opening.memory,
            opening.disk,
            chat_template=template,
            rows=opening.rows,
        )

    def prepare(self, request: ChatRequest) -> Prepared:
        """See `Engine`."""
        text = self.tokenizer.apply_chat_template(
            [_text_message(m) for m in request.messages],
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return self.prepared(request, {"input_ids": ids.to(self.model.device)})

    def prepared(self, request: ChatRequest, inputs: dict[str, Any]) -> Prepared:
        """Adds to a prompt's tensors what a request says of its decoding."""
        columns = inputs["input_ids"].shape[1]
        limit = self._limit
        if columns >= limit:
            raise ValueError(f"the messages are {columns} tokens, the model reads up to {limit}; send fewer")
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
        first = all(message.role != "assistant" for message in request.messages)
        return Prepared(inputs, options, tuple(request.stop), request.seed, stem, first, request.owner)

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

    def joins(self, together: Sequence[Prepared], other: Prepared) -> bool:
        """See `Engine`: rows of one cache, see `textkv.serve.rows`."""
        several = [*together, other]
        columns = max(x.inputs["input_ids"].shape[1] for x in several)
        longest = max(x.options["max_new_tokens"] for x in several)
        return all(map(stands_alone, several)) and columns + longest <= self._limit

    def answer_rows(
        self,
        together: Sequence[Prepared],
        gives: Sequence[Callable[[str], None]],
        cancelled: Sequence[Callable[[], bool]],
        done: Done,
    ) -> None:
        """See `Engine`. A client that goes away hears it within one step; its row is padding until the others end."""
        ends = self._ends()
        ids, mask = padded([x.inputs["input_ids"] for x in together], ends[0] if ends else 0)
        each = zip(together, gives, cancelled, strict=True)
        rows = [
            Row(_Growing(self._words(x.stop), give, gone, ids.shape[1]), x.options["max_new_tokens"])
            for x, give, gone in each
        ]

        def finish(number: int, ended: bool) -> None:
            row, prompt = rows[number], together[number].inputs["input_ids"].shape[1]
            if row.growing.left:
                done(number, Cancelled())
                return
            row.growing.finish()
            done(number, Outcome(row.growing.text, "stop" if ended else "length", prompt, 0, row.tokens))

        options = together[0].options | {"max_new_tokens": max(row.limit for row in rows)}
        hearing = StoppingCriteriaList([Rows(rows, ends, ids.shape[1], finish)])
        # Not put on the shelf: rows of one cache cannot go on by themselves.
        self.shelf.new().generate(
            ids, attention_mask=mask, stopping_criteria=hearing, pad_token_id=ends[0] if ends else 0, **options
        )

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

    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        return [] if ends is None else ends if isinstance(ends, list) else [ends]


ENGINES = Registry("engine", "agentkv.engines", "Engine")
"""Engines by name. Wings add theirs by entry points, so that a server serves what is installed."""
ENGINES["text"] = ChatEngine


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that a decoder leaves out with `skip_special_tokens`."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = (number for number, token in added.items() if token.special)
    return frozenset([*getattr(tokenizer, "all_special_ids", ()), *marked])


def _text_message(message: Message) -> dict[str, str]:
    parts = list(message.parts())
    if any(isinstance(part, bytes) for part in parts):
        raise ValueError("this model reads text only; send no pictures, or serve a vision-language model")
    # Newer clients call the system's turn the developer's; templates know the old name.
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": "".join(parts)}


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
