"""The canvas: columns, blocks, positions under left padding, and writing tokens row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm.canvas import Canvas
from tests.dlm.toys import MASK, PAD, prompts


def make(*lengths: int, gen: int = 6, block: int = 4, shift: int = 0) -> Canvas:
    ids, mask = prompts(*lengths)
    return Canvas(ids, mask, gen_length=gen, block_length=block, mask_id=MASK, shift=shift)


def test_prompts_stand_left_and_masks_behind():
    canvas = make(2, 4)
    assert canvas.ids.shape == (2, 10) and canvas.prompt == 4 and canvas.length == 10
    assert canvas.ids[0, :2].tolist() == [PAD, PAD]
    assert (canvas.generated == MASK).all() and not canvas.masked()[:, :4].any()
    assert canvas.real_start.tolist() == [2, 0]
    assert canvas.position_ids[0].tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 6, 7]
    assert canvas.valid[0].tolist() == [False, False] + [True] * 8


def test_without_padding_there_is_no_mask():
    assert make(4, 4).valid is None


def test_last_block_may_be_short():
    canvas = make(4)
    assert canvas.blocks == 2
    assert [canvas.block_range(i) for i in range(2)] == [(4, 8), (8, 10)]
    assert canvas.block_start(torch.tensor([0, 1, 2])).tolist() == [4, 8, 10]
    with pytest.raises(ValueError, match=r"block=2: this canvas has blocks 0..1"):
        canvas.block_range(2)


def test_an_empty_prompt_is_legal_without_shift():
    canvas = Canvas(torch.zeros(1, 0, dtype=torch.int64), gen_length=4, block_length=2, mask_id=MASK, shift=0)
    assert canvas.active.tolist() == [0] and canvas.position_ids.tolist() == [[0, 1, 2, 3]]


def test_rows_go_on_at_their_own_pace():
    canvas = make(4, 4, 4)
    slots = torch.tensor([[4, 5, 6, 7], [4, 5, -1, -1], [4, 5, 6, 7]])
    tokens = torch.arange(12).view(3, 4)
    where = torch.tensor([[True] * 4, [True, False, True, True], [False] * 4])
    written = canvas.commit(slots, tokens, where)
    assert canvas.ids[:, 4:8].tolist() == [[0, 1, 2, 3], [4, MASK, MASK, MASK], [MASK] * 4]
    assert written.sum(1).tolist() == [4, 1, 0]
    assert canvas.active.tolist() == canvas.active_cpu.tolist() == [1, 0, 0]
    assert canvas.left_cpu.tolist() == [2, 5, 6]


def test_an_entry_without_slot_never_writes():
    canvas = make(4)
    before = canvas.ids.clone()
    assert not canvas.commit(torch.tensor([[-1, -1]]), torch.tensor([[5, 6]]), torch.tensor([[True, True]])).any()
    assert torch.equal(canvas.ids, before)


def test_finishing_a_row_fills_behind_the_end_and_leaves_others():
    canvas = make(4, 4)
    canvas.commit(torch.tensor([[9], [4]]), torch.tensor([[3], [3]]), torch.ones(2, 1, dtype=torch.bool))
    changed = canvas.finish_row(torch.tensor([5, canvas.length]), torch.tensor([7, 7]))
    assert canvas.ids[0, 4:].tolist() == [MASK, MASK, 7, 7, 7, 7]
    assert changed[0].nonzero()[:, 0].tolist() == [6, 7, 8, 9] and not changed[1].any()
    assert canvas.active.tolist() == [0, 0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5), st.integers(1, 12), st.integers(1, 12), st.data())
def test_progress_is_read_from_the_masks(prompt, gen, block, data):
    canvas = Canvas(
        torch.zeros(2, prompt, dtype=torch.int64), gen_length=gen, block_length=min(block, gen), mask_id=MASK, shift=0
    )
    while not canvas.done:
        where = torch.tensor(data.draw(st.lists(st.booleans(), min_size=2 * gen, max_size=2 * gen))).view(2, gen)
        where[torch.arange(2), data.draw(st.integers(0, gen - 1))] = True
        slots = torch.arange(prompt, prompt + gen).expand(2, -1)
        canvas.commit(slots, torch.ones_like(slots), where & canvas.masked()[:, prompt:])
        for row in range(2):
            blocks = [i for i in range(canvas.blocks) if canvas.masked()[row, slice(*canvas.block_range(i))].any()]
            assert canvas.active[row] == (blocks[0] if blocks else canvas.blocks)
        if bool((canvas.generated == MASK).sum() < 3):
            canvas.finish_row(torch.full((2,), prompt - 1), torch.tensor([1, 1]))
    assert canvas.active.tolist() == [canvas.blocks] * 2
