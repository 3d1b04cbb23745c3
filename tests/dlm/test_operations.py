"""What a forward asks of torch: counted, not timed. Fast-dLLM's own step takes 2,040 operations with 8 layers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dlm.decode import decode
from dlm.loop import Loop
from tests.dlm.toys import llada

FORWARD = "the model's forward"


@pytest.mark.parametrize("cache", ["prefix", "dual", "freecache"])
def test_a_step_with_eight_layers(cache, monkeypatch):
    """In the middle of a block, rule and loop included."""
    model, step, seen = llada(8), Loop.step, []
    plain = model.forward

    def forward(*args, **kwargs):
        with record_function(FORWARD):
            return plain(*args, **kwargs)

    def counted(self):
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            out = step(self)
        found = [(event.name, event.time_range) for event in trace.events()]
        span = next(at for name, at in found if name == FORWARD)
        inside = Counter(n for n, at in found if n.startswith("aten::") and span.start <= at.start <= span.end)
        seen.append((Counter(n for n, _ in found if n.startswith("aten::")), inside))
        return out

    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr(Loop, "step", counted)
    decode(model, torch.zeros(1, 40, dtype=torch.int64), gen_length=8, block_length=8, steps=4, cache=cache)
    whole, inside = seen[2]
    assert sum(inside.values()) <= 1430
    # Loop, rule and cache. Where masks are, how many to write and what has ended is known on the host.
    assert sum((whole - inside).values()) <= 77
    assert whole["aten::copy_"] <= 18  # 16 of them are the keys and values that are stored
