"""Keys and values of a piece of text in a frame of their own, cut out of caches and put together into new ones.

A `Span` is canonical: its keys carry the rotary phase of positions 0, 1, 2, .., wherever they were read. So spans of
one text can be compared and added, whatever stood before them, and are turned once, when they are placed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from transformers import PreTrainedModel

from textkv import rotary
from textkv.budgets import Budget
from textkv.cache import MethodCache
from textkv.evidence import Evidence, Needs
from textkv.kinds import attention_modules, describe
from textkv.method import Method
from textkv.positions import RotarySpec
from textkv.segments.base import Step


@dataclass(frozen=True, eq=False)
class Span:
    """Consecutive tokens of all layers.

    Attributes:
        keys: [layers, kv_heads, tokens, head_dim], as if the first token lay at position 0.
        values: the same shape.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.keys.nbytes + self.values.nbytes

    def first(self, tokens: int) -> Span:
        """A view of the first tokens."""
        return Span(self.keys[:, :, :tokens], self.values[:, :, :tokens])

    def __sub__(self, other: Span) -> Span:
        return Span(self.keys - other.keys, self.values - other.values)

    def __add__(self, other: Span) -> Span:
        return Span(self.keys + other.keys, self.values + other.values)


class Spans:
    """Cuts spans out of the caches of one model and makes caches of spans.

    Args:
        model: a decoder whose layers all have full attention, alike in heads. One with M-RoPE may be: a text, and a
            whole picture, moves by one number on all axes.

    Raises:
        ValueError: a layer that keeps no key per token, or keys whose rotation is not known or changes with the length.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        other = next((kind for kind in describe(model) if kind.name != "full"), None)
        if other is not None:
            raise ValueError(
                f"{type(model).__name__}: layer {other.number} is of kind {other.name} and keeps no key for every "
                "token; texts can be shared only between layers of full attention"
            )
        self.model = model
        self._modules = attention_modules(model)
        specs = rotary.proven(model, sorted(self._modules))
        self._groups = _alike([specs[number] for number in sorted(specs)])

    # ---- cutting and placing -----------------------------------------------------------------------------------

    def cut(self, cache: MethodCache, start: int, stop: int, place: int | None = None) -> Span:
        """A copy of the tokens [start, stop) of a full cache of one row, in their own frame.

        Args:
            place: rotary position of the first of them; None = its number.
        """
        held = [layer.stored() for layer in cache.layers]
        keys = torch.cat([x.keys[:, :, start:stop] for x in held])
        values = torch.cat([x.values[:, :, start:stop] for x in held])
        return Span(self.turned(keys, -(start if place is None else place)), values)

    def turned(self, keys: torch.Tensor, by: int) -> torch.Tensor:
        """Keys [layers, kv_heads, tokens, head_dim] moved by so many positions, either way; angles in fp64."""
        if by == 0 or not keys.shape[2]:
            return keys
        delta = torch.full((1, keys.shape[2]), by, device=keys.device)
        parts = [(numbers, spec.turn(keys[numbers].flatten(0, 1)[None], delta)[0]) for numbers, spec in self._groups]
        if len(parts) == 1:
            return parts[0][1].view(keys.shape)
        out = torch.empty_like(keys)
        for numbers, part in parts:
            out[numbers] = part.view(len(numbers), *keys.shape[1:])
        return out

    def placed(self, parts: Sequence[Span], places: Sequence[int] | None = None) -> Span:
        """The parts one behind another as one span.

        Args:
            places: rotary position at which each begins; None = each takes as many positions as it has tokens.
        """
        if places is None:
            places = [0, *accumulate(part.tokens for part in parts)][: len(parts)]
        keys = [self.turned(part.keys, place) for part, place in zip(parts, places, strict=True)]
        return Span(torch.cat(keys, 2), torch.cat([part.values for part in parts], 2))

    def cache(self, whole: Span, method: str | Method = "full", budget: Budget | float | str | None = None):
        """A cache that has read `whole`, from position 0 on.

        Args:
            method: what keeps it from then on; it acts as at the end of a prompt, after the parts were put together.

        Raises:
            ValueError: a method that wants to see the queries of a prompt which nobody has read, or another model's
                span.
        """
        self.check(whole)
        cache = MethodCache(self.model, method, budget)
        if cache.context.needs != Needs():
            raise ValueError(
                f"{cache.method.expression} looks at the queries of a prompt, or at where its tokens lie, and a cache "
                "put together of spans knows neither; use a method that goes by keys and values, e.g. keydiff or knorm"
            )
        at = torch.arange(whole.tokens, device=whole.keys.device, dtype=torch.int32)[None]
        seen = torch.tensor([whole.tokens])
        with torch.inference_mode():
            for number, layer in enumerate(cache.layers):
                module = self._modules[layer.kind.number]
                k, v = whole.keys[number][None].contiguous(), whole.values[number][None].contiguous()
                none, scale = k[:, :, :0], getattr(module, "scaling", None) or k.shape[-1] ** -0.5
                layer.replay(Step(none, k, v, at, scale), Evidence(none, scale, seen))
        return cache

    def check(self, span: Span) -> None:
        """Raises ValueError unless the span may be one of this model's."""
        config = self.model.config.get_text_config()
        mine = (len(self._modules), config.num_key_value_heads, self.model.dtype)
        theirs = (span.keys.shape[0], span.keys.shape[1], span.keys.dtype)
        if mine != theirs:
            raise ValueError(
                f"a span of {theirs[0]} layers, {theirs[1]} KV heads and {theirs[2]} was given to a model of "
                f"{mine[0]}, {mine[1]} and {mine[2]}; agents share a cache only if they run the same checkpoint"
            )


def _alike(specs: Sequence[RotarySpec]) -> list[tuple[list[int] | slice, RotarySpec]]:
    """Layers by how their keys turn: one call of the kernel serves all that turn alike."""
    groups: list[tuple[list[int], RotarySpec]] = []
    for number, spec in enumerate(specs):
        for numbers, known in groups:
            if all(torch.equal(getattr(known, f), getattr(spec, f)) for f in ("inv_freq", "first", "second")):
                numbers.append(number)
                break
        else:
            groups.append(([number], spec))
    return [(slice(None), groups[0][1])] if len(groups) == 1 else groups
