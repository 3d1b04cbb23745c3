"""How keys turn: rotation by one and three axes, the table of rotary positions, and caches of models with M-RoPE."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F

from tests.compare import mismatch
from tests.kernels.test_rotate import model_rope
from tests.textkv import tiny
from textkv import Conversation, MethodCache, probes
from textkv.kernels.rotate import frequency_axes
from textkv.positions import PositionTable, RotarySpec, turned

TURNED = "kivi(8,group=16,residual=16,centre='turned')"


def test_a_centre_turns_as_a_key_does():
    torch.manual_seed(0)
    x, at = torch.randn(1, 2, 1, 6), torch.tensor([[[0, 3, -3]]])
    out = turned(x, at, torch.tensor([1.0, 0.5]))
    assert torch.equal(out[:, :, 0], x[:, :, 0]) and torch.equal(out[..., 4:], x[..., 4:].expand(1, 2, 3, 2))
    for p, row in ((3, out[:, :, 1]), (-3, out[:, :, 2])):
        for f, inv_freq in enumerate((1.0, 0.5)):
            key = torch.complex(x[:, :, 0, f], x[:, :, 0, f + 2]) * torch.polar(
                torch.ones(()), torch.tensor(p * inv_freq)
            )
            assert not mismatch(torch.complex(row[..., f], row[..., f + 2]), key)
    assert not mismatch(turned(out, -at, torch.tensor([1.0, 0.5])), x.expand(1, 2, 3, 6))


@pytest.mark.parametrize("family, sections", [("qwen2_5_vl", [8, 12, 12]), ("qwen3_vl", [12, 10, 10])])
def test_three_axes_turn_as_the_model_turns_keys(family, sections):
    torch.manual_seed(0)
    x, at = torch.randn(2, 2, 20, 64), torch.randint(0, 500, (3, 2, 20))
    truth, inv_freq = model_rope(family, x, at, sections)
    axes = torch.tensor(frequency_axes(sections, family == "qwen3_vl"), dtype=torch.int32)
    inv_freq = inv_freq.float().expand(2, 2, -1)
    assert not mismatch(turned(x, at[:, :, None], inv_freq, axes), truth, rtol=1e-5, atol=1e-5)


# ---- the table -------------------------------------------------------------------------------------------------------


def test_rotary_positions_are_found_by_logical_position_whatever_the_padding():
    table, seen = PositionTable(), torch.full((3, 2, 200), -1)
    torch.manual_seed(0)
    first = torch.zeros(2, dtype=torch.int64)
    for m, pads in ((20, (0, 7)), (1, (0, 0)), (150, (3, 0)), (1, (0, 0)), (5, (0, 0))):
        real = torch.arange(m) >= torch.tensor(pads)[:, None]
        logical = (first[:, None] + real.cumsum(1) - 1).masked_fill(~real, -1)
        rope = torch.randint(0, 10_000, (3, 2, m))
        table.write(logical.int(), int(first.max()) + m, rope)
        for row in range(2):
            seen[:, row, logical[row][real[row]]] = rope[:, row, real[row]]
        first += real.sum(1)
    for row, n in enumerate(first.tolist()):
        every = torch.arange(n).view(1, 1, -1).expand(1, 2, -1).int()
        assert torch.equal(table.of(every, torch.tensor([row])), seen[:, row, None, None, :n].expand(-1, -1, 2, -1))
    both = torch.tensor([[[0, -1]], [[5, 8]]]).int()
    found = table.of(both)
    assert found.shape == (3, 2, 1, 2) and found.dtype == torch.int32
    assert torch.equal(found[:, 1, 0], seen[:, 1, [5, 8]].int())
    table.take_rows(torch.tensor([1, 1, 0]))
    assert torch.equal(table.table[:, 2, :100], seen[:, 0, :100].int()) and table.table.shape[1] == 3


def test_the_table_grows_by_an_eighth_and_weighs_twelve_bytes_a_token():
    table, sizes = PositionTable(), set()
    for column in range(4000):
        table.write(torch.tensor([[column]]).int(), column + 1, None)
        sizes.add(table.table.shape[2])
    assert torch.equal(table.table[:, 0, :4000], torch.arange(4000).expand(3, -1).int())
    assert len(sizes) < 30 and max(sizes) < 4000 * 1.2 and table.kv_bytes() == 12 * max(sizes)
    assert PositionTable().kv_bytes() == 0


def test_what_the_model_did_not_tell_lies_at_its_index():
    table = PositionTable()
    table.write(torch.tensor([[0, 1], [0, 1]]).int(), 2, torch.tensor([[[7, 9]]]))  # one axis and one row serve all
    table.write(torch.tensor([[2], [2]]).int(), 3, None)
    assert table.table[:, :, :3].tolist() == [[[7, 9, 2]] * 2] * 3


def test_one_axis_needs_no_table():
    at = torch.arange(6).view(1, 2, 3).int()
    assert RotarySpec.halves(torch.ones(2)).at(at) is at


# ---- caches of models with M-RoPE ------------------------------------------------------------------------------------


class Talk:
    """Two padded rows with two screenshots and one, read and then decoded by any cache."""

    def __init__(self, model):
        self.model = model
        one, two = (tiny.screens(frames, seed=frames, text=9, grid=(4, 6))[0] for frames in (2, 1))
        width = one["input_ids"].shape[1]
        pad = width - two["input_ids"].shape[1]
        self.inputs = {x: torch.cat([one[x], two[x]]) for x in ("pixel_values", "image_grid_thw")}
        for name in ("input_ids", "mm_token_type_ids"):
            self.inputs[name] = torch.cat([one[name], F.pad(two[name], (pad, 0))])
        self.mask = torch.ones(2, width, dtype=torch.int64)
        self.mask[1, :pad] = 0
        self.rope, _ = model.model.get_rope_index(
            self.inputs["input_ids"], image_grid_thw=self.inputs["image_grid_thw"], attention_mask=self.mask,
            mm_token_type_ids=self.inputs["mm_token_type_ids"],
        )  # fmt: skip
        self.tokens = self.mask.sum(1).tolist()

    def read(self, method=TURNED, deaf: bool = False) -> MethodCache:
        cache = MethodCache(self.model, method)
        if deaf:
            probes.remove(self.model)
        with torch.no_grad():
            self.model(**self.inputs, attention_mask=self.mask, position_ids=self.rope, past_key_values=cache)
        return cache

    @torch.no_grad()
    def decode(self, cache, start: int, stop: int, rows=(0, 1), seed: int = 0) -> torch.Tensor:
        """Logits [rows, tokens, vocabulary] of decoded tokens start, start + 1, .."""
        rows, ids, out = torch.tensor(rows), tiny.text_ids(64, 2, seed), []
        ends = self.rope.amax((0, 2))[rows, None]
        for i in range(start, stop):
            mask = F.pad(self.mask[rows], (0, i + 1), value=1)
            at = (ends + 1 + i).expand(3, -1, 1)
            out.append(self.model(ids[rows, i : i + 1], attention_mask=mask, position_ids=at, past_key_values=cache))
        return torch.cat([x.logits for x in out], 1)

    def rotary_positions(self, row: int, decoded: int) -> torch.Tensor:
        """The rotary positions int32 [3, tokens] of a row, by logical position."""
        prompt = self.rope[:, row, self.mask[row] == 1]
        return torch.cat([prompt, (prompt.max() + 1 + torch.arange(decoded)).expand(3, -1)], 1).int()


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def talk(request, model_of):
    return Talk(model_of(request.param))


def same_positions(talk, cache, rows, decoded):
    """Whether a cache's table holds the rotary positions of these rows, `decoded` tokens after the prompt."""
    table, ends = cache.context.table.table, [talk.tokens[row] + decoded for row in rows]
    pairs = zip(rows, ends, strict=True)
    return all(torch.equal(table[:, i, :n], talk.rotary_positions(row, decoded)) for i, (row, n) in enumerate(pairs))


def test_a_cache_knows_where_each_token_lies(talk):
    cache = talk.read()
    talk.decode(cache, 0, 40)
    assert same_positions(talk, cache, (0, 1), 40)
    layers = sum(layer.kv_bytes() for layer in cache.layers)
    assert cache.kv_bytes() == layers + cache.context.table.table.nbytes and cache.peak_bytes >= cache.kv_bytes()
    for layer in cache.layers:
        packed = layer.segments[0]
        assert len(packed.pools) > 1 and bool(packed.inv_freq.any(-1).all())
        for pool in packed.pools:
            for row in range(2):
                at = pool.positions[row, 0, : int(pool.counts[row].max())].long()
                assert torch.equal(pool.rope[:, row, 0, : len(at)], talk.rotary_positions(row, 40)[:, at])


def test_only_what_needs_a_table_has_one(talk, model_of):
    assert MethodCache(talk.model, "snapkv+kivi(4)").context.table is not None
    for method in ("full", "snapkv", "kivi(4,centre='fixed')"):
        assert MethodCache(talk.model, method).context.table is None
    assert MethodCache(model_of("qwen2"), "kivi(4)").context.table is None


@pytest.mark.parametrize("method", [TURNED, f"adakv+{TURNED}", f"duo_attention+{TURNED}"])
def test_keys_are_stored_as_well_as_without_turning(talk, method):
    def error(method) -> float:
        cache, whole = talk.read(method), talk.read("full")
        for other in (cache, whole):
            talk.decode(other, 0, 40)
        held, true = cache.layers[0].stored(), whole.layers[0].stored()
        for row in range(2):
            order = true.positions[row, 0].argsort(stable=True)[-talk.tokens[row] - 40 :]
            real = held.positions[row] >= 0
            for head in range(2):
                ours = held.keys[row, head][real[head]]
                exact = true.keys[row, head][order][held.positions[row, head][real[head]].long()]
                yield float((ours - exact).norm() / exact.norm())

    scored = method.replace("adakv", "snapkv+adakv")
    ours, fixed = list(error(scored)), list(error(scored.replace("turned", "fixed")))
    assert max(ours) < 0.01 and sum(ours) < 1.5 * sum(fixed)


def test_positions_that_no_probe_saw_are_taken_for_the_index(talk):
    cache, whole = talk.read(deaf=True), talk.read("full")
    every = torch.arange(talk.tokens[0]).expand(3, -1).int()
    assert torch.equal(cache.context.table.table[:, 0, : talk.tokens[0]], every)
    held, true = cache.layers[0].stored(), whole.layers[0].stored()
    assert torch.equal(held.positions[0], true.positions[0])
    assert not mismatch(held.keys[0], true.keys[0], rtol=0, atol=0.2)  # a coarser code, still of the same keys


def test_copies_go_on_alike(talk, tmp_path):
    cache = talk.read()
    talk.decode(cache, 0, 10)
    cache.save(tmp_path)
    pickled = pickle.loads(pickle.dumps(cache))
    pickled.bind(talk.model)
    copies = [cache.fork(), MethodCache.load(tmp_path, talk.model), pickled]
    expected = talk.decode(cache, 10, 40)
    for other in copies:
        assert not mismatch(talk.decode(other, 10, 40), expected, rtol=1e-5, atol=1e-5)
        assert same_positions(talk, other, (0, 1), 40)


def test_rows_take_their_rotary_positions_along(talk):
    cache = talk.read()
    moves = {
        (1, 0): lambda x: x.reorder_cache(torch.tensor([1, 0])),
        (0, 0, 1, 1): lambda x: x.batch_repeat_interleave(2),
        (1,): lambda x: x.batch_select_indices(torch.tensor([False, True])),
        (0,): lambda x: x.batch_select_indices(torch.tensor([0])),
    }
    copies = {rows: cache.fork() for rows in moves}
    expected = talk.decode(cache, 0, 40)
    for rows, move in moves.items():
        move(copies[rows])
        ours = talk.decode(copies[rows], 0, 40, rows)
        assert not mismatch(ours, expected[list(rows)], rtol=1e-4, atol=1e-4)
        assert same_positions(talk, copies[rows], rows, 40)


def test_what_is_taken_back_leaves_no_trace(talk):
    cache = talk.read()
    talk.decode(cache, 0, 7)  # both rows have just packed
    other = cache.fork()
    talk.decode(other, 7, 13, seed=1)
    other.crop(-6)
    assert not mismatch(talk.decode(other, 7, 40), talk.decode(cache, 7, 40), rtol=1e-4, atol=1e-4)
    assert same_positions(talk, other, (0, 1), 40)
    cache.reset()
    assert cache.context.table.table is None and cache.kv_bytes() == 0


def test_a_model_that_runs_with_another_cache_in_between_does_not_disturb(talk):
    cache, other = talk.read(), talk.read()
    ours = [talk.decode(x, i, i + 1) for i in range(20) for x in (cache, other)]
    assert all(torch.equal(a, b) for a, b in zip(ours[::2], ours[1::2], strict=True))
    assert same_positions(talk, cache, (0, 1), 20)


def test_a_conversation_of_several_turns(model_of):
    model = model_of("qwen2_5_vl")
    chat = Conversation(model, TURNED)
    (first, _), (both, _) = tiny.screens(1, text=9), tiny.screens(2, text=9)
    out = chat.generate(**first, max_new_tokens=20)
    added = both["input_ids"][:, first["input_ids"].shape[1] :]
    ids = torch.cat([out, added], 1)
    kinds = (ids == tiny.IMAGE).long()
    grids = both["image_grid_thw"]
    chat.generate(
        ids, mm_token_type_ids=kinds, pixel_values=both["pixel_values"], image_grid_thw=grids, max_new_tokens=3
    )
    rope, _ = model.model.get_rope_index(ids, image_grid_thw=grids, mm_token_type_ids=kinds)
    assert torch.equal(chat.cache.context.table.table[:, :, : ids.shape[1]], rope.int())
