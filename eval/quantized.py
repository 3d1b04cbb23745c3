"""transformers' own quantised caches by names that stand beside ours in a table: `hf-quanto(4)`, `hf-hqq(2)`, `hf-fp8`.

They run in the same model, through the same attention function, on the same prompts, and are counted the same way: by
the storages that they keep alive (codes, scales and the full-precision tokens that wait), plus, at each peak, the keys
and values that they hand to attention. `hf-quanto` and `hf-hqq` need the extra `quantized`, `hf-fp8` a
transformers newer than 5.17.

What differs is what they do: the whole prompt is quantised when it ends, every decoded token dequantises all of it, and
every 128 tokens all of it, loss included, is quantised again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from shutil import which
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, QuantizedCache, __version__, cache_utils
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from textkv import AtRest, Budget, MethodCache, resolve_method
from textkv.expression import construct, parse_call
from textkv.registry import Registry
from textkv.segments.base import storage_bytes

PREFIX = "hf-"
HAS_FP8 = hasattr(cache_utils, "Fp8QuantizedLayer")
BACKENDS = Registry("cache of transformers")


@dataclass(frozen=True)
class Fp8:
    """8-bit floats with one scale per tensor, frozen at the end of the prompt."""

    backend: ClassVar[str] = "fp8"
    name: ClassVar[str]

    def settings(self) -> dict[str, Any]:
        """What `QuantizedCache` takes."""
        return {}

    def check_installed(self) -> None:
        """Raises ValueError, with the mend, if what the backend needs is not there."""
        if not HAS_FP8:
            raise ValueError(f"{self.name}: transformers {__version__} has no such cache; 5.23 has, pip install -U it")


@dataclass(frozen=True)
class Grouped(Fp8):
    """What the integer backends have in common; every default is transformers' own.

    Attributes:
        bits: of a code.
        axis_key, axis_value: which axis groups do not run along, in the backend's own counting.
        group: numbers that share a scale.
        residual: tokens after the prompt that stay in full precision until there are so many.
    """

    bits: int = 4
    axis_key: int = 0
    axis_value: int = 0
    group: int = 64
    residual: int = 128

    allowed: ClassVar[tuple[int, ...]]
    axes: ClassVar[tuple[int, ...]]

    def __post_init__(self) -> None:
        if self.bits not in self.allowed:
            raise ValueError(f"bits={self.bits}: {self.name} stores {', '.join(map(str, self.allowed))}")
        for what in ("axis_key", "axis_value"):
            if getattr(self, what) not in self.axes:
                raise ValueError(f"{what}={getattr(self, what)}: {self.name} knows {' and '.join(map(str, self.axes))}")
        if min(self.group, self.residual) < 1:
            raise ValueError(f"group={self.group}, residual={self.residual}: both must be at least 1; theirs: 64, 128")

    def settings(self) -> dict[str, Any]:
        """The arguments of transformers' `QuantizedCache`."""
        return {
            "nbits": self.bits, "axis_key": self.axis_key, "axis_value": self.axis_value,
            "q_group_size": self.group, "residual_length": self.residual,
        }  # fmt: skip


@dataclass(frozen=True)
class Quanto(Grouped):
    """Minimum and maximum per group. Axis 0: 64 numbers on end (part of one token); -1: 64 tokens of a channel."""

    backend: ClassVar[str] = "quanto"
    allowed: ClassVar[tuple[int, ...]] = (2, 4)
    axes: ClassVar[tuple[int, ...]] = (0, -1)

    def check_installed(self) -> None:
        """Raises ValueError naming what is missing: optimum-quanto, or what compiles its C++."""
        if not is_optimum_quanto_available():
            raise ValueError(_missing(self.name, "optimum-quanto"))
        if not (which("ninja") and which("c++")):
            raise ValueError(
                f"{self.name}: its first use compiles C++ and finds no ninja or no c++ on the PATH; "
                "install a C++ compiler and put the environment's bin folder on the PATH"
            )


@dataclass(frozen=True)
class Hqq(Grouped):
    """Zero points fitted step by step. Axis 1: 64 numbers on end; 0: 64 that lie a 64th of the tensor apart."""

    backend: ClassVar[str] = "hqq"
    allowed: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 8)
    axes: ClassVar[tuple[int, ...]] = (0, 1)

    def check_installed(self) -> None:
        """Raises ValueError if hqq is missing."""
        if not is_hqq_available():
            raise ValueError(_missing(self.name, "hqq"))


for _kind in (Fp8, Quanto, Hqq):
    BACKENDS.register(PREFIX + _kind.backend)(_kind)


def _missing(name: str, package: str) -> str:
    return f"{name} needs {package}, which is not installed; pip install 'agentkv[quantized]'"


def parse_foreign(method: str) -> Fp8:
    """The cache of transformers that "hf-quanto(4, axis_key=-1)" stands for.

    Raises:
        ValueError: unknown name, impossible setting, or a package that is missing; the message has the mend.
    """
    if "+" in method.partition("(")[0] or ")+" in method:
        raise ValueError(f"method {method!r}: a cache of transformers cannot be put behind or before a method")
    name, args, kwargs = parse_call(method)
    found = construct(BACKENDS.find(name), f"method {method!r}", args, kwargs)
    found.check_installed()
    return found


def takes_budget(method: str, budget: str) -> bool:
    """Whether a budget changes what `method` (ours or transformers') does. Raises ValueError for a bad one."""
    if method.startswith(PREFIX):
        parse_foreign(method)
        return False
    return resolve_method(method, Budget.parse(budget)).budgeted


def open_cache(model: PreTrainedModel, method: str, budget: str) -> MethodCache | ForeignCache:
    """An empty cache for `model`, ours or transformers'; both say what they hold in the same words."""
    if method.startswith(PREFIX):
        return ForeignCache(model, parse_foreign(method))
    return MethodCache(model, method, budget)


class ForeignCache(QuantizedCache):
    """transformers' cache with what `MethodCache` tells about itself: `at_rest`, `peak_bytes`, `seconds`, bytes.

    Attributes:
        at_rest: what was held when the prompt had been read.
        peak_bytes: the most bytes held, with one layer's keys and values as attention got them.
    """

    def __init__(self, model: PreTrainedModel, kind: Fp8) -> None:
        super().__init__(kind.backend, model.config, **kind.settings())
        self.kind = kind
        self.at_rest: AtRest | None = None
        self.peak_bytes = 0
        self.seconds: dict[str, float] = {}
        self._seen_bytes = 0
        self._layer_bytes = [0] * len(self.layers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As transformers has it.

        Raises:
            ValueError: the backend cannot group these tensors.
        """
        try:
            given = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except AssertionError as error:  # hqq's word for a group that does not fit
            raise ValueError(f"{self.kind.name}: {error}; use another group") from None
        self._seen_bytes += key_states.nbytes + value_states.nbytes
        self._layer_bytes[layer_idx] = storage_bytes(list(tensors_in(vars(self.layers[layer_idx]))))
        self.peak_bytes = max(self.peak_bytes, sum(self._layer_bytes) + sum(x.nbytes for x in given))
        if self.at_rest is None and layer_idx == len(self.layers) - 1:
            self.at_rest = AtRest(self.kv_bytes(), self.full_bytes(), float(self.get_seq_length()), ())
        return given

    def kv_bytes(self) -> int:
        """Bytes held now: every storage that a layer keeps alive."""
        return sum(self._layer_bytes)

    def full_bytes(self) -> int:
        """Bytes of K and V that came in."""
        return self._seen_bytes


def tensors_in(held: Any) -> Iterator[torch.Tensor]:
    """The plain tensors within `held`: tensors, what wrapper tensors are made of, members of containers."""
    if isinstance(held, torch.Tensor) and hasattr(held, "__tensor_flatten__"):
        for name in held.__tensor_flatten__()[0]:
            yield from tensors_in(getattr(held, name))
    elif isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict):
        for part in held.values():
            yield from tensors_in(part)
    elif isinstance(held, tuple | list):
        for part in held:
            yield from tensors_in(part)
