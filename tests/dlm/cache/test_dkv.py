"""dKV-Cache: which slots are computed, and when."""

from __future__ import annotations

import pytest
import torch

from dlm.cache import resolve_cache
from dlm.canvas import Canvas
from dlm.decode import decode
from tests.dlm.toys import MASK, Counter, Rule, prompts


class Spy(Counter):
    """Keeps the slots that each forward computed and the masks that it saw."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__(shift)
        self.queries, self.masks = [], []

    def __call__(self, input_ids, *, past_key_values, **rest):
        plan = past_key_values.plan
        slots = plan.wanted(1, past_key_values.length, torch.device("cpu"))[0].nonzero()[:, 0]
        self.queries.append(set(slots.tolist()))
        self.masks.append(
            {int(s) for s, token in zip(slots, input_ids[0], strict=True) if token == self.decoding_spec.mask_id}
        )
        return super().__call__(input_ids, past_key_values=past_key_values, **rest)


def watch(cache: str, rule: Rule, shift: int = 0) -> Spy:
    model = Spy(shift)
    decode(model, torch.zeros(1, 5, dtype=torch.int64), gen_length=16, block_length=8, cache=cache, unmask=rule)
    return model


@pytest.mark.parametrize("rule", [Rule(), Rule(quota=3), Rule(threshold=0.4)])
def test_queries_are_the_masks_before_the_last_commit(rule):
    spy = watch("dkv(None)", rule)
    partial = 0
    for t in range(1, len(spy.queries)):
        if len(spy.queries[t]) < 21:
            partial += 1
            # All masks lie among a forward's queries, so today's masks and the last commit are the last masks.
            assert spy.queries[t] == spy.masks[t - 1]
    assert partial


def test_the_whole_canvas_comes_twice_at_each_blocks_start_and_at_every_refresh():
    def whole(cache):
        return [t for t, queries in enumerate(watch(cache, Rule()).queries) if len(queries) == 21]

    assert whole("dkv(None)") == [0, 1, 8, 9]
    assert whole("dkv(3)") == [0, 1, 3, 6, 8, 9, 11, 14]
    assert whole("dkv(3,reset_each_block=False)") == [0, 1, 3, 6, 9, 12, 15]


def test_with_a_shift_the_rows_that_predict_are_computed_too():
    spy = watch("dkv(None)", Rule(), shift=1)
    for t, queries in enumerate(spy.queries):
        if len(queries) < 21:
            assert queries == spy.masks[t - 1] | {slot - 1 for slot in spy.masks[t - 1]}


def test_rows_that_leave_ask_for_nothing():
    ids, mask = prompts(2, 2)
    canvas = Canvas(ids, mask, gen_length=4, block_length=4, mask_id=MASK, shift=0)
    run = resolve_cache("dkv(None)").begin(canvas, None)
    for _ in range(2):
        run.plan(torch.full((2, 1), -1))
        run.after(torch.zeros_like(canvas.masked()))
    slots = torch.arange(2, 6).expand(2, -1)
    canvas.commit(slots, torch.ones_like(slots), torch.tensor([[True], [False]]))
    for part in (run, canvas):
        part.take_rows(torch.tensor([1]))
    plan = run.plan(torch.full((1, 1), -1))
    assert canvas.rows.tolist() == [1] and plan.queries.slots.tolist() == [2, 3, 4, 5]
