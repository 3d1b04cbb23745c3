"""How tests compare tensors: what differs is said in words, and a test asserts that there is nothing to say."""

from __future__ import annotations

from typing import Any

import torch


def mismatch(ours: Any, truth: Any, **bounds: Any) -> str:
    """What `torch.testing.assert_close` has against two tensors, or two like collections of them; "" = nothing.

    bounds: its options, `rtol` and `atol` among them; without any, its own for the dtype.
    """
    try:
        torch.testing.assert_close(ours, truth, **bounds)
    except AssertionError as error:
        return str(error)
    return ""
