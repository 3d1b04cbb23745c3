"""How large the tensors are that some code makes."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """While it is on, `numbers` is the size of the largest floating tensor that any operation made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                given = any(isinstance(a, torch.Tensor) and a.data_ptr() == x.data_ptr() for a in args)
                self.numbers = max(self.numbers, 0 if given else x.numel())
        return out
