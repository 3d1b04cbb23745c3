"""Screenshots that the vision tower has encoded: the same pixels are not encoded twice.

A prompt that is read afresh shows the last screenshots again at every step, and a page that did not change gives the
same one once more. A tower looks at each picture by itself, so what it made of one before holds, but for the rounding
of matrix products of another height. Of a picture that changed in places nothing is taken over: the blocks of full
attention, of which every known tower has some, spread a changed patch over the whole picture.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from agentkv.standin import stands_in

FEATURES = ("pooler_output", "deepstack_features")  # what decoders read of a tower's output


PLACES = ("model.visual", "vision_tower")
"""Where the architectures that we know have their towers."""


def tower_of(model: PreTrainedModel) -> Tower | None:
    """The tower of a model, the same one each time; None for a model without one that is known."""
    if model not in _TOWERS:
        known = dict(model.named_modules())
        module = next((known[place] for place in PLACES if place in known), None)
        _TOWERS[model] = None if module is None else Tower(module)
    return _TOWERS[model]


_TOWERS: WeakKeyDictionary[PreTrainedModel, Tower | None] = WeakKeyDictionary()


@contextmanager
def shown(model: PreTrainedModel, pictures: Sequence[bytes]) -> Iterator[None]:
    """A context in which a model reads a prompt with these pictures: those that its tower knows are not encoded again.

    Args:
        pictures: digests of their pixels, in the order of the prompt; none = nothing is remembered.
    """
    tower = tower_of(model) if pictures else None
    with nullcontext() if tower is None else tower.shows(pictures):
        yield


@dataclass
class _Encoded:
    """Of one picture: `features` by the names in FEATURES, fp [tokens, hidden] or a list of these, one a layer."""

    kind: type[ModelOutput]
    features: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for held in self.features.values() for x in (held if isinstance(held, list) else [held]))


class Tower:
    """A vision tower that remembers as many pictures as the longest prompt had, and one more.

    Those that were not shown for the longest time go first. Outside of `shows` the tower is as it was, also for
    other threads meanwhile; several may show pictures at once.

    Args:
        module: called with pixels [patches, values] and grid_thw [pictures, 3], as those of the Qwen families are.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _now: ClassVar[threading.local] = threading.local()

    def __init__(self, module: torch.nn.Module) -> None:
        self._module, self._most = module, 0
        self._held: OrderedDict[tuple, _Encoded] = OrderedDict()
        self._weights: tuple = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the features that are held, on the model's device."""
        return sum(one.nbytes for one in self._held.values())

    @contextmanager
    def shows(self, pictures: Sequence[bytes]) -> Iterator[None]:
        """A context in which the model reads a prompt with these pictures, in order, by digests of their pixels."""
        with stands_in(self._module, "forward", partial(_asking, here=self._now)):
            self._now.shown = self, tuple(pictures)
            try:
                yield
            finally:
                self._now.shown = None

    def encode(
        self, forward: Callable[..., Any], pictures: Sequence[bytes], pixels: torch.Tensor, grids: torch.Tensor
    ) -> Any:
        """What `forward` gives for all pictures, called for those that are not held.

        Args:
            pixels: [patches, values] of all pictures, int64 `grids` [pictures, 3] their (time, rows, columns).
        """
        keys = [(picture, *grid) for picture, grid in zip(pictures, grids.tolist(), strict=True)]
        with self._lock:
            self._check_weights(pixels)
            known = {key: self._held[key] for key in keys if key in self._held}
        new = {key: number for number, key in enumerate(keys) if key not in known}
        if new:
            numbers, patches = list(new.values()), pixels.split(grids.prod(-1).tolist())
            out = forward(torch.cat([patches[n] for n in numbers]), grid_thw=grids[numbers])
            known |= zip(new, _parts(out, grids[numbers].prod(-1)), strict=True)
        with self._lock:
            for key in keys:
                self._held[key] = known[key]
                self._held.move_to_end(key)
            self._most = max(self._most, len(known) + 1)
            while len(self._held) > self._most:
                self._held.popitem(last=False)
        shown = [known[key].features for key in keys]
        return known[keys[0]].kind(**{name: _joined([one[name] for one in shown]) for name in shown[0]})

    def _check_weights(self, pixels: torch.Tensor) -> None:
        """Forgets all when the tower is another one: trained on, adapted, or moved."""
        weights = list(self._module.parameters())
        # What was made in inference mode counts no changes.
        changes = sum(0 if x.is_inference() else x._version for x in weights)
        now = len(weights), changes, sum(x.data_ptr() for x in weights), pixels.dtype, pixels.device
        if now != self._weights:
            self._held.clear()
            self._weights = now


def _asking(forward: Callable[..., Any], here: threading.local) -> Callable[..., Any]:
    def ask(pixels: torch.Tensor, grid_thw: torch.Tensor, **options: Any) -> Any:
        now = getattr(here, "shown", None)
        asks_more = any(options.get(name) for name in ("output_hidden_states", "output_attentions"))
        if now is None or len(now[1]) != len(grid_thw) or asks_more or torch.is_grad_enabled():
            return forward(pixels, grid_thw=grid_thw, **options)
        tower, pictures = now
        return tower.encode(partial(forward, **options), pictures, pixels, grid_thw)

    return ask


def _parts(out: ModelOutput, patches: torch.Tensor) -> list[_Encoded]:
    """The output cut by pictures of so many patches."""
    merged = int(patches.sum()) // len(out["pooler_output"])
    sizes = (patches // merged).tolist()
    cut = {name: _cut(out[name], sizes) for name in FEATURES if out.get(name) is not None}
    return [_Encoded(type(out), dict(zip(cut, part, strict=True))) for part in zip(*cut.values(), strict=True)]


def _cut(held: torch.Tensor | list[torch.Tensor], sizes: list[int]) -> list[Any]:
    if isinstance(held, list):
        return [list(part) for part in zip(*(_cut(layer, sizes) for layer in held), strict=True)]
    return [x.clone() for x in held.split(sizes)]  # a view would keep all pictures of the forward alive


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], list):
        return [torch.cat(layer) for layer in zip(*parts, strict=True)]
    return torch.cat(parts)
