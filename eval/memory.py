"""What a decoded token needs beside the cache: the largest tensor that it makes, and the most bytes alive at once.

A cache that is small between layers only, and rebuilds a layer's keys and values for attention, shows here and nowhere
else. Tensors are seen as PyTorch's operations hand them out, on any device; scratch space inside one operation is not,
but on a GPU the bytes alive are the allocator's own, which leave nothing out. All of the model's activations count.
Off a GPU our kernels' plain reference works on 256 tokens at a time in float32: so much is needed at any length.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from textkv import MethodCache, use

from .quantized import ForeignCache, open_cache, tensors_in


class Allocations(TorchDispatchMode):
    """While it is on, storages made anew are counted, each once.

    Args:
        held: tensors whose going makes room for others: a buffer that moves to a larger one is not there twice.

    Attributes:
        largest: bytes of the largest storage made.
        maker: the operation that made it.
        alive: the most bytes by which the storages made and held were ever more than those held at first.
    """

    def __init__(self, held: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.largest, self.maker, self.alive = 0, "", 0
        storages = [x.untyped_storage() for x in held]
        self._alive = {x._cdata: (StorageWeakRef(x), x.nbytes()) for x in storages}
        self._first = sum(size for _, size in self._alive.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tensors_in([args, kwargs])}
        for x in tensors_in(made):
            storage = x.untyped_storage()
            if storage._cdata not in given:
                self._note(storage, str(function))
        return made

    def _note(self, storage: torch.UntypedStorage, maker: str) -> None:
        self._alive = {at: held for at, held in self._alive.items() if not held[0].expired()}
        self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = max(self.alive, sum(size for _, size in self._alive.values()) - self._first)
        if storage.nbytes() > self.largest:
            self.largest, self.maker = storage.nbytes(), maker


WATCHED = 4
"""Tokens that `decoding_row` decodes."""


@dataclass(frozen=True)
class StepMemory:
    """The worst of the decoded tokens.

    Attributes:
        largest: bytes of the largest tensor that a step made.
        maker: the operation that made it.
        alive: the most bytes of a step's own tensors alive at once, over what the cache held before the step.
        layer_bytes: K and V of one layer in full precision, all tokens seen: what both are compared with.
    """

    largest: int
    maker: str
    alive: int
    layer_bytes: float

    def row(self) -> dict[str, Any]:
        """The figures by the names they have in a table's rows."""
        return {
            "step_largest": self.largest, "step_largest_by": self.maker, "step_alive": self.alive,
            "step_largest_share": self.largest / self.layer_bytes, "step_alive_share": self.alive / self.layer_bytes,
        }  # fmt: skip


@torch.inference_mode()
def decoding_memory(model: PreTrainedModel, method: str, budget: str, ids: torch.Tensor, prompt: int) -> StepMemory:
    """Reads the first `prompt` tokens of ids int64 [batch, n], then feeds the others one by one."""
    use(model)
    ids = ids.to(model.device)
    cache = open_cache(model, method, budget)
    model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
    steps = [_step(model, cache, ids[:, i : i + 1]) for i in range(prompt, ids.shape[1])]
    largest, maker = max((step.largest, step.maker) for step, _ in steps)
    alive = max(alive for _, alive in steps)
    return StepMemory(largest, maker, alive, cache.full_bytes() / len(cache.layers))


def check_length(length: int) -> None:
    """Raises ValueError for a prompt that is too short."""
    if length < 128:
        raise ValueError(f"memory={length}: give the tokens of a prompt, at least 128; a multiple of 64 packs a buffer")


def decoding_row(model: PreTrainedModel, method: str, budget: str, length: int) -> dict[str, Any]:
    """The figures of four decoded tokens around `length` random ones. At a multiple of 64 the second of them fills the
    buffer of our packed methods, so that packing counts too; transformers' caches quantise again after 128 tokens only.

    Raises:
        ValueError: a prompt too short to hold such a buffer.
    """
    check_length(length)
    some = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, length + WATCHED // 2), generator=some)
    seen = decoding_memory(model, method, budget, ids, length - WATCHED // 2)
    return {"memory_tokens": length, "n": WATCHED, **seen.row()}


def _held(cache: MethodCache | ForeignCache) -> list[torch.Tensor]:
    if isinstance(cache, MethodCache):
        return [x for layer in cache.layers for x in layer.tensors().values()]
    return list(tensors_in([vars(layer) for layer in cache.layers]))


def _step(model: PreTrainedModel, cache: MethodCache | ForeignCache, token: torch.Tensor) -> tuple[Allocations, int]:
    """One decoded token: what it made, and the most bytes alive."""
    cuda = token.device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with Allocations(_held(cache)) as seen:
        model(token, past_key_values=cache)
    return seen, torch.cuda.max_memory_allocated() - before if cuda else seen.alive
