"""LaCache's ladder: its sizes and offsets, streams of compactions, coverage, and the authors' wider passes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from textkv.methods.lacache import Ladder, OfficialLadder

LAYOUTS = ("staircase", "interleaved")
LADDERS = [
    Ladder(layers, span, overlap, layout)
    for layers in range(2, 11)
    for span in range(1, layers)
    for overlap in range(span)
    for layout in LAYOUTS
    if -(-span // (span - overlap)) <= -(-(layers - span) // (span - overlap))
]


class Stream:
    """Token ids per offset, compacted with plain lists, one ladder block at a time and never a further thought."""

    def __init__(self, ladder, limit, sinks, recent, offsets):
        self.ladder, self.limit, self.sinks, self.recent = ladder, limit, sinks, recent
        self.held, self.cursor, self.passes = {offset: [] for offset in offsets}, sinks, 1

    def feed(self, *tokens):
        for offset in self.held:
            self.held[offset] = [*self.held[offset], *tokens]
        while self.length > self.limit:
            self._compact_one_block()

    @property
    def length(self):
        return len(next(iter(self.held.values())))

    def _compact_one_block(self):
        block, kept = self.ladder.block, self.ladder.kept
        if self.cursor + kept > self.limit - self.recent:
            self.cursor, self.passes = self.sinks, self.passes + 1
        for offset, ids in self.held.items():
            first, end = self.cursor + offset, self.cursor + block
            self.held[offset] = ids[: self.cursor] + ids[first : first + kept] + ids[end:]
        self.cursor += kept


@pytest.mark.parametrize(
    ("layers", "span", "overlap", "sizes"),
    [(32, 16, 0, (2, 1, 1)), (32, 8, 4, (7, 2, 5)), (32, 9, 3, (5, 2, 3)), (24, 9, 7, (9, 5, 4)), (8, 4, 2, (3, 2, 1))],
)
def test_block_kept_and_freed_of_the_specification(layers, span, overlap, sizes):
    ladder = Ladder(layers, span, overlap)
    assert (ladder.block, ladder.kept, ladder.freed) == sizes


def test_the_two_layouts_of_the_toy_case():
    offsets = lambda layout: [Ladder(8, 4, 2, layout).offset(i, 1) for i in range(8)]  # noqa: E731
    assert offsets("interleaved") == [0, 1] * 4
    assert offsets("staircase") == [0] * 4 + [1] * 4


TOY = {
    0: [0, 1, 2, 3, 6, 8, 11, 12, 15, 17, 19, 20, *range(22, 30)],
    1: [0, 1, 4, 6, 9, 10, 13, 15, 17, 18, *range(20, 30)],
}


@pytest.mark.parametrize("kind", [Ladder, OfficialLadder])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_toy_stream(kind, layout):
    """8 layers, size 20, span 4, overlap 2, 2 first tokens; tokens 0 to 29 one by one."""
    ladder = kind(8, 4, 2, layout)
    for layer in range(8):
        ids, cursor, cursors = torch.arange(20), 2, []
        for token in range(20, 30):
            slots, cursor = ladder.compact(21, 20, cursor, layer=layer, sinks=2, recent=8)
            ids = torch.cat([ids, torch.tensor([token])])[slots]
            cursors.append(cursor)
        assert ids.tolist() == TOY[ladder.offset(layer, 1)]
        assert cursors == [4, 6, 8, 10, 12] * 2


@pytest.mark.parametrize("ladder", [Ladder(8, 2, 0, "interleaved"), Ladder(10, 4, 3, "staircase")], ids=str)
def test_a_long_stream_equals_plain_lists(ladder):
    limit, sinks, recent, layers = 24, 2, 8, ladder.layers
    naive = Stream(ladder, limit, sinks, recent, range(ladder.freed + 1))
    ids, cursors = [torch.empty(0, dtype=torch.int64)] * layers, [sinks] * layers
    for token in range(10 * limit):
        naive.feed(token)
        for layer in range(layers):
            ids[layer] = torch.cat([ids[layer], torch.tensor([token])])
            slots, cursors[layer] = ladder.compact(
                len(ids[layer]), limit, cursors[layer], layer=layer, sinks=sinks, recent=recent
            )
            ids[layer] = ids[layer][slots]
            assert ids[layer].tolist() == naive.held[ladder.offset(layer, ladder.freed)]
        assert cursors == [naive.cursor] * layers
    assert naive.passes > 3


def test_inside_a_block_every_layer_keeps_as_many_and_no_token_is_lost():
    for ladder in LADDERS:
        offsets = [ladder.offset(layer, ladder.freed) for layer in range(ladder.layers)]
        assert set(offsets) == set(range(ladder.freed + 1)), ladder
        assert {offset + k for offset in offsets for k in range(ladder.kept)} == set(range(ladder.block)), ladder
        if ladder.layout == "staircase":
            assert offsets == sorted(offsets), ladder


@settings(max_examples=40, deadline=None)
@given(data=st.data(), ladder=st.sampled_from(LADDERS), sinks=st.integers(0, 5))
def test_what_holds_after_any_blocks(data, ladder, sinks):
    recent = data.draw(st.integers(ladder.freed, ladder.layers), label="recent")
    limit = data.draw(st.integers(sinks + ladder.kept + recent, sinks + ladder.kept + recent + 30), label="limit")
    layers = [torch.empty(0, dtype=torch.int64)] * ladder.layers
    cursors, seen = [sinks] * ladder.layers, 0
    for more in data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=6), label="blocks"):
        before = len(layers[0])
        new, seen = torch.arange(seen, seen + more), seen + more
        for i, held in enumerate(layers):
            ids = torch.cat([held, new])
            slots, cursors[i] = ladder.compact(len(ids), limit, cursors[i], layer=i, sinks=sinks, recent=recent)
            layers[i] = ids[slots]
        length = len(layers[0])
        assert all(len(ids) == length <= limit for ids in layers) and len(set(cursors)) == 1
        if before + more > limit:
            assert length > limit - ladder.freed
            newest = list(range(seen - (recent - ladder.freed + 1), seen))
            assert all(ids[len(ids) - len(newest) :].tolist() == newest for ids in layers)
        for ids in layers:
            assert bool((ids.diff() > 0).all()) and ids[: min(sinks, seen)].tolist() == list(range(min(sinks, seen)))


def test_the_ends_of_the_range():
    halves = Ladder(9, 8, 0)
    assert (halves.block, halves.kept, halves.freed) == (2, 1, 1)
    assert [halves.offset(i, 1) for i in range(9)] == [0] * 8 + [1]
    assert Ladder(9, 4, 3).block == 6 == max(ladder.block for ladder in (Ladder(9, 4, o) for o in range(4)))


def test_one_offset_for_all_is_a_strided_window():
    slots, cursor = Ladder(8, 4, 0).compact(30, 20, 4, layer=0, sinks=4, recent=6)
    assert slots.tolist() == [*range(4), *range(4, 24, 2), *range(24, 30)] and cursor == 14


@pytest.mark.parametrize(("span", "overlap", "distinct"), [(8, 4, 627), (16, 0, 444)])
def test_coverage_of_a_long_stream(span, overlap, distinct):
    """32 layers of 256 slots after 2048 tokens; a sliding window of the same memory covers 256."""
    ladder = OfficialLadder(32, span, overlap, "interleaved")
    naive = Stream(ladder, 256 + ladder.freed // 2, 4, 32, range(ladder.freed + 1))
    for token in range(2048):
        naive.feed(token)
    assert len({token for ids in naive.held.values() for token in ids}) == distinct


def test_further_passes_are_one_wider_pass_in_the_authors_code():
    """3 layers, span 2; 30 tokens into 12: 7 blocks of 2, then 2 passes as 6 blocks of 3."""
    run = lambda kind, layer: kind(3, 2, 0, "interleaved").compact(30, 12, 2, layer=layer, sinks=2, recent=3)  # noqa: E731
    expected = (
        [0, 1, 2, 8, 14, 18, 21, 24, 27, 28, 29],
        [0, 1, 5, 11, 16, 19, 22, 25, 27, 28, 29],
        [0, 1, 6, 12, 17, 20, 23, 26, 27, 28, 29],
    )
    for layer, ids in enumerate(expected):
        slots, cursor = run(OfficialLadder, layer)
        assert slots.tolist() == ids and cursor == 8
        assert len(run(Ladder, layer)[0]) == 12


def test_one_restart_is_the_same_in_both():
    for layer in range(4):
        both = [
            kind(4, 2, 1, "interleaved").compact(30, 24, 14, layer=layer, sinks=4, recent=4)
            for kind in (Ladder, OfficialLadder)
        ]
        assert torch.equal(both[0][0], both[1][0]) and both[0][1] == both[1][1] < 14


@pytest.mark.parametrize(
    ("shape", "tokens", "limit"), [((24, 9, 7), 64 * 256, 258), ((32, 9, 3), 1100, 256), ((4, 2, 0), 132, 20)]
)
def test_wider_passes_that_store_a_token_twice_or_run_out_are_refused(shape, tokens, limit):
    arguments = dict(layer=0, sinks=4, recent=shape[0])
    with pytest.raises(
        ValueError, match=r"further passes.*below the width.*before the newest of .*use a larger budget"
    ):
        OfficialLadder(*shape, "interleaved").compact(tokens, limit, 4, **arguments)
    ladder = Ladder(*shape, "interleaved")
    assert limit - ladder.freed < len(ladder.compact(tokens, limit, 4, **arguments)[0]) <= limit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 8, 0), r"span=8: a ladder needs 1 <= span < layers, and the model has 8 layers"),
        ((8, 0, 0), r"span=0: a ladder needs 1 <= span"),
        ((8, 4, 4), r"overlap=4: a ladder needs 0 <= overlap < span, and span is 4"),
        ((8, 4, -1), r"overlap=-1: a ladder needs 0 <= overlap"),
        ((12, 7, 1), r"span=7, overlap=1: each of 12 layers would keep all 2 tokens of a block; a ladder needs ceil"),
    ],
)
@pytest.mark.parametrize("kind", [Ladder, OfficialLadder])
def test_ladders_that_free_nothing_are_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(*arguments)
