"""A model answers prompts with a cache of their own each: one by itself, or several as rows of one cache.

What is asked and what comes back is all that passes between an agent and its model, so that the model may be in another
process, which several agents share (`python -m eval.webtasks --ray local --models 1`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch
import torch.nn.functional as F
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from agentkv.spans import Span
from agentkv.tower import shown
from textkv import Budget, MethodCache, resolve_method
from textkv.cache import Trajectory
from textkv.kinds import describe

_COLUMNS = {"input_ids", "attention_mask", "mm_token_type_ids"}
PADDING = 8  # of a row, a part of so many at most: more is work for nothing, and bytes that a row alone has not


@dataclass(frozen=True)
class Asked:
    """A prompt: `inputs` for `model(**inputs)` of one row, where its screenshots lie, and how its cache is kept.
    `learned`: what the method learned from the earlier steps of the task; `pictures`: see `agentkv.models.Prompt`.
    """

    inputs: dict[str, torch.Tensor]
    spans: Sequence[Span]
    grids: Sequence[tuple[int, int]]
    method: str
    budget: Budget
    max_new_tokens: int
    learned: Trajectory | None = None
    pictures: Sequence[bytes] = ()


@dataclass(frozen=True)
class Answered:
    """The tokens of an answer, that which ended it among them, and the figures of `agentkv.agent.Decision`. `kept`: per
    layer int32 [1, heads, n] prompt positions, -1 = none.
    """

    tokens: list[int]
    learned: Trajectory | None
    kept: tuple[torch.Tensor, ...]
    seconds_prefill: float
    seconds_decode: float
    kv_bytes: int
    kv_bytes_peak: int
    kv_bytes_full: int
    tokens_stored: float


class PrefillClock(LogitsProcessor):
    """Notes when the first logits exist: the prompt is read and compressed, decoding begins."""

    def __init__(self, note: Callable[[], None] = lambda: None) -> None:
        self.time: float | None = None
        self._note = note

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.time is None:
            if scores.is_cuda:
                torch.cuda.synchronize(scores.device)
            self.time = perf_counter()
            self._note()
        return scores


@torch.inference_mode()
def answer(model: PreTrainedModel, asked: Asked) -> Answered:
    """The greedy answer to one prompt. Raises ValueError for a cache that cannot be."""
    cache = MethodCache(model, asked.method, asked.budget)
    if asked.learned is not None:
        cache.follow(asked.learned)
    known = {name: x for name, x in asked.inputs.items() if name in _COLUMNS}
    cache.begin(spans=[asked.spans], grids=[asked.grids], **known)
    clock = PrefillClock()
    begin = perf_counter()
    with shown(model, asked.pictures):
        out = _generate(model, asked.inputs, cache, asked.max_new_tokens, clock)
    tokens = out[0, asked.inputs["input_ids"].shape[1] :].tolist()  # .tolist() waits for the device
    rest, end = cache.at_rest, perf_counter()
    return Answered(
        tokens, cache.trajectory, rest.kept, clock.time - begin, end - clock.time, rest.kv_bytes, cache.peak_bytes,
        rest.full_bytes, float(rest.tokens_stored),
    )  # fmt: skip


@torch.inference_mode()
def answer_together(model: PreTrainedModel, several: Sequence[Asked]) -> list[Answered]:
    """The answers to prompts that `joins` lets together, as rows of one cache, padded on the left.

    Tokens, and what is kept at rest, are those of `answer` but for rounding. Bytes of a row may be more by its padding:
    some stores are rectangles, others pack whole blocks. Of the most bytes held it is given the part that its prompt is
    of all, of the seconds an equal one.
    """
    lengths = [one.inputs["input_ids"].shape[1] for one in several]
    columns = max(lengths)
    ends = _ends(model)
    inputs = _padded(several, columns, ends[0] if ends else 0)
    moved = [
        [(start + columns - n, end + columns - n) for start, end in one.spans]
        for one, n in zip(several, lengths, strict=True)
    ]
    cache = MethodCache(model, several[0].method, several[0].budget)
    known = {name: x for name, x in inputs.items() if name in _COLUMNS}
    cache.begin(spans=moved, grids=[one.grids for one in several], **known)
    rest: list[tuple[int, int, float]] = []
    clock = PrefillClock(lambda: rest.extend(_row_at_rest(cache, row, n / columns) for row, n in enumerate(lengths)))
    begin = perf_counter()
    with shown(model, [picture for one in several for picture in one.pictures]):
        out = _generate(model, inputs, cache, several[0].max_new_tokens, clock)
    told, end = out[:, columns:].tolist(), perf_counter()
    share = 1 / len(several)
    return [
        Answered(
            _cut(told[row], ends), None, tuple(_of_row(layer, row) for layer in cache.at_rest.kept),
            (clock.time - begin) * share, (end - clock.time) * share, rest[row][0],
            round(cache.peak_bytes * n / sum(lengths)), rest[row][1], rest[row][2],
        )
        for row, n in enumerate(lengths)
    ]  # fmt: skip


def joins(model: PreTrainedModel, together: Sequence[Asked], other: Asked) -> bool:
    """Whether a prompt may be a row beside those: the same cache and limit, about the same length, and nothing learned
    from step to step.
    """
    first, lengths = together[0], [one.inputs["input_ids"].shape[1] for one in (*together, other)]
    if (max(lengths) - min(lengths)) * PADDING > max(lengths):
        return False
    same = (first.method, first.budget, first.max_new_tokens) == (other.method, other.budget, other.max_new_tokens)
    if not same or first.inputs.keys() != other.inputs.keys() or resolve_method(first.method).remembers:
        return False
    # States of linear attention would read the padding.
    return all(kind.attends for kind in describe(model))


@dataclass(frozen=True)
class SharedModel:
    """A model that agents in other processes ask, in the form of `textkv.command.desk.Able`."""

    model: PreTrainedModel

    def one(self, asked: Asked) -> Answered:
        """See `answer`."""
        return answer(self.model, self._here(asked))

    def several(self, asked: Sequence[Asked]) -> list[Answered]:
        """See `answer_together`."""
        return answer_together(self.model, [self._here(one) for one in asked])

    def joins(self, together: Sequence[Asked], other: Asked) -> bool:
        """See `joins`."""
        return joins(self.model, together, other)

    def _here(self, asked: Asked) -> Asked:
        """The same on the model's device, in its numbers; what an agent without weights sends has neither."""
        model = self.model
        inputs = {
            name: x.to(model.device, model.dtype if x.is_floating_point() else x.dtype)
            for name, x in asked.inputs.items()
        }
        return replace(asked, inputs=inputs)


def _generate(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], cache: MethodCache, limit: int, clock: PrefillClock
) -> torch.Tensor:
    clocks = LogitsProcessorList([clock])
    return model.generate(
        **inputs, past_key_values=cache, max_new_tokens=limit, do_sample=False, logits_processor=clocks
    )


def _ends(model: PreTrainedModel) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def _cut(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """A row up to the token that ended it: padding follows until the others have ended."""
    last = next((n for n, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]


def _padded(several: Sequence[Asked], columns: int, pad: int) -> dict[str, torch.Tensor]:
    """Inputs of all as rows, padding on the left; pictures lie one behind the other."""
    out = {}
    for name in several[0].inputs:
        parts = [one.inputs[name] for one in several]
        if name in _COLUMNS:
            value = pad if name == "input_ids" else 0
            parts = [F.pad(x, (columns - x.shape[1], 0), value=value) for x in parts]
        out[name] = torch.cat(parts)
    return out


def _row_at_rest(cache: MethodCache, row: int, share: float) -> tuple[int, int, float]:
    """Bytes of a row by itself, those of the model's own cache for its `share` of the columns, and tokens per head."""
    alone = cache.fork()
    alone.batch_select_indices(torch.tensor([row]))
    lengths = [layer.lengths()[row].float().mean() for layer in cache.context.layers]
    return alone.kv_bytes(), round(alone.full_bytes() * share), float(torch.stack(lengths).mean())


def _of_row(kept: torch.Tensor, row: int) -> torch.Tensor:
    """One row of positions [batch, heads, n], without the columns in which it has none."""
    mine = kept[row : row + 1]
    return mine[:, :, (mine >= 0).any(1)[0]]
