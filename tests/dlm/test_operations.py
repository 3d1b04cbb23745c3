"""What a forward asks of torch: counted, not timed. Fast-dLLM's own step takes 2,040 operations with 8 layers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dlm.decode import decode
from dlm.loop import Loop
from tests.dlm.toys import llada


@pytest.mark.parametrize("cache", ["prefix", "dual", "freecache"])
def test_a_step_with_eight_layers(cache, monkeypatch):
    """In the middle of a block, rule and loop included."""
    step, seen = Loop.step, []

    def counted(self):
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            out = step(self)
        seen.append(Counter(event.name for event in trace.events() if event.name.startswith("aten::")))
        return out

    monkeypatch.setattr(Loop, "step", counted)
    decode(llada(8), torch.zeros(1, 40, dtype=torch.int64), gen_length=8, block_length=8, steps=4, cache=cache)
    middle = seen[2]
    assert sum(middle.values()) <= 1850
    assert middle["aten::copy_"] <= 36  # 16 of them are the keys and values that are stored
