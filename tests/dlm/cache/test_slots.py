"""Slots: after any forward every slot is held once, and by the last forward that computed it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm.cache.plan import Packing, Plan
from dlm.cache.slots import SlotCache
from dlm.decode import decode
from dlm.loop import Loop
from dlm.models.backbone import full_tables, rope_tables, rotate
from tests.dlm.toys import Counter, Rule, llada, prompts, traced


class Marker(Counter):
    """Writes each slot's position and the number of the forward as its key, and checks what is held."""

    def __call__(self, input_ids, *, position_ids, past_key_values, **rest):
        plan, forward = past_key_values.plan, len(self.shapes)
        k = torch.stack([position_ids, torch.full_like(position_ids, forward)], -1)[:, None].float()
        layer = past_key_values.update(k, k, 0)[0].layer
        layer.write(k, k, plan)
        length, rows = past_key_values.length, len(layer.k)
        real = torch.ones(rows, length, dtype=torch.bool) if plan.visible is None else plan.visible
        own = real.long().cumsum(1) - 1
        assert torch.equal(layer.k[:, 0, :, 0][real].long(), own[real])
        queried = plan.wanted(rows, length, real.device)
        # Rows that are finished leave the cache, and with it what is known of them.
        alive = self.canvas.rows
        self.age[alive] = torch.where(queried, forward, self.age[alive])
        assert torch.equal(layer.k[:, 0, :, 1][real].long(), self.age[alive][real])
        return super().__call__(input_ids, position_ids=position_ids, past_key_values=past_key_values, **rest)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["freecache", "freecache(0)", "freecache(refresh=4)", "prefix", "dual", "dkv(5)"]),
    st.lists(st.integers(1, 7), min_size=1, max_size=3), st.integers(1, 14), st.integers(1, 5), st.integers(0, 4),
    st.integers(0, 1),
)  # fmt: skip
def test_every_slot_is_held_once_whatever_is_accepted(cache, lengths, gen, block, run, shift):
    ids, mask = prompts(*lengths)
    model = Marker(shift, vocab=25)
    model.age = torch.full((len(ids), ids.shape[1] + gen), -1)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(Loop, "step", lambda loop, step=Loop.step: setattr(model, "canvas", loop.canvas) or step(loop))
    done = decode(
        model, ids, mask, gen_length=gen, block_length=min(block, gen), cache=cache, unmask=Rule(run=run), eos="none"
    )
    monkey.undo()
    # Every forward went through the marker's own assertions, and all of the canvas was written.
    assert len(model.shapes) == done.stats.forwards > 0
    assert not bool((done.ids == model.decoding_spec.mask_id).any())


def test_a_packed_write_equals_a_window():
    k = torch.randn(2, 2, 3, 4)
    packing = Packing.of(torch.tensor([[0, 0, 1, 1, 1, 0]] * 2).bool())
    packed = k.transpose(0, 1).flatten(1, 2)[None]
    assert torch.equal(packing.spread(packed), k) and torch.equal(packing.gather(k), packed)
    stores = []
    for queries, new in ((slice(2, 5), k), (packing, packed)):
        layer = SlotCache(6).layer(0)
        layer.write(new, -new, Plan(queries, None))
        stores.append((layer.k, layer.v))
    assert all(torch.equal(a, b) for a, b in zip(*stores, strict=True))


def test_a_packing_of_unequal_rows():
    packing = Packing.of(torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 1], [0] * 6]).bool())
    assert packing.slots.tolist() == [1, 4, 0, 2, 5] and packing.columns.tolist() == [0, 1, 0, 1, 2]
    assert packing.grid[:2].tolist() == [[0, 1, 1], [2, 3, 4]]
    table = torch.arange(18).view(3, 6)
    assert packing.take(table).tolist() == [[1, 4, 6, 8, 11]]
    assert Plan(packing, None).rows(torch.tensor([[4, -1], [5, 0], [3, -1]]), 6)[0, [0, 2, 3]].tolist() == [1, 4, 2]
    twice = Plan(packing, None).repeated(2).packing
    assert twice.take(table.repeat(2, 1)).tolist() == [[1, 4, 6, 8, 11] * 2]
    heads = torch.randn(1, 2, 10, 4)
    assert torch.equal(twice.gather(twice.spread(heads)), heads)


@pytest.mark.parametrize("delay", [0, 1])
def test_freecache_against_a_slow_one_that_stores_keys_before_rotation(delay):
    """Written from the paper alone: lists, no windows in place, every key rotated again at every step."""
    model, (ids, _) = llada(), prompts(5)
    got, seen = traced(model, ids, f"freecache({delay})")
    tokens, frozen, before = torch.cat([ids, ids.new_full((1, 12), model.decoding_spec.mask_id)], 1), 0, 0
    kept = [[None] * 17 for _ in model.layers]
    with torch.no_grad():
        for slots, logits in seen:
            hidden = model.embed(tokens[:, frozen:])
            for layer, held in zip(model.layers, kept, strict=True):
                normed = layer.input_norm(hidden)
                for row, slot in enumerate(range(frozen, 17)):
                    held[slot] = (layer.to_k(normed)[0, row], layer.to_v(normed)[0, row])
                k, v = (torch.stack([x[i] for x in held]).view(17, 4, 8).transpose(0, 1)[None] for i in (0, 1))
                q = layer.to_q(normed).view(1, -1, 4, 8).transpose(1, 2)
                q = rotate(q, full_tables(rope_tables(torch.arange(frozen, 17)[None], 8, 100.0)))
                k = rotate(k, full_tables(rope_tables(torch.arange(17)[None], 8, 100.0)))
                out = (q @ k.mT * 8**-0.5).softmax(-1) @ v
                hidden = hidden + layer.to_out(out.transpose(1, 2).flatten(2))
                hidden = hidden + layer.ffn(hidden)
            whole = model.head(model.final_norm(hidden))
            wanted = slots[0] >= 0
            mine = whole[0, slots[0, wanted] - frozen].index_fill(
                -1, torch.tensor(model.decoding_spec.mask_id), -torch.inf
            )
            assert torch.allclose(mine, logits[0, wanted], atol=1e-5)
            best = mine.softmax(-1).max(-1)
            tokens[0, slots[0, wanted][best.values.argmax()]] = best.indices[best.values.argmax()]
            first = (tokens[0, 5:] == model.decoding_spec.mask_id).int().argmax() // 4
            frozen, before = 5 + 4 * int(before if delay else first), int(first)
    assert torch.equal(tokens[:, 5:], got.ids)


def test_bytes_are_those_of_the_slots():
    ids, _ = prompts(5)
    stats = [
        decode(llada(), ids, gen_length=4, block_length=4, cache=cache, unmask=Rule()).stats
        for cache in ("dual", "none")
    ]
    assert stats[0].cache_bytes == stats[0].cache_bytes_peak == 2 * 2 * 32 * 9 * 4
    assert stats[1].cache_bytes == stats[1].cache_bytes_peak == 0
