"""Fixtures of the kernel tests: the Triton interpreter, and memory that starts as NaN.

The interpreter is switched on by exchanging the jitted functions for the length of a test, not by TRITON_INTERPRET:
that variable works only if it is set before Triton is first imported, which in a whole run other tests have done.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch

from textkv import kernels

INTERNAL = ("_tiles",)  # modules with device functions beside those of the operations


def version(module: ModuleType) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(42)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN: an output that a kernel does not write, or reads before it writes, shows."""

    def filled(allocate):
        def allocated(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return allocated

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch, poison: None) -> Iterator[None]:
    """Triton kernels run on the CPU, into poisoned memory; use with `_backend="triton"`."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if version(triton) < (3, 9) and version(np) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 cannot loop under numpy 2.4; use numpy < 2.4 or a newer Triton")
    from triton.language import standard
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    ours = [importlib.import_module(f"textkv.kernels.{name}") for name in (*kernels.OPERATIONS, *INTERNAL)]
    for module in (triton.language, standard, *ours):
        for name, function in list(vars(module).items()):
            if isinstance(function, JITFunction):
                monkeypatch.setattr(module, name, InterpretedFunction(function.fn))
    with np.errstate(all="ignore"):  # log(0) = -inf is meant, on a GPU too
        yield


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
