"""The ragged segment: whatever comes and goes, it attends as a list of regions does, and idles in little."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tests.compare import mismatch
from textkv.kernels import decode_attention
from textkv.segments.base import Step
from textkv.segments.ragged import RaggedSegment

HEADS, DIM = 3, 16


class Model:
    """Regions as plain lists of (key, value, position), and the segment that shall equal them."""

    def __init__(self, lengths: list[list[int]]) -> None:
        self.next = [100] * len(lengths)
        self.regions = [[self.token(p) for p in range(n)] for row in lengths for n in row]
        k, v, p = (torch.cat(x) for x in zip(*(t for region in self.regions for t in region), strict=True))
        self.segment = RaggedSegment(k, v, p, torch.tensor(lengths))

    @staticmethod
    def token(position: int):
        return torch.randn(1, DIM), torch.randn(1, DIM), torch.tensor([position], dtype=torch.int32)

    def append(self, m: int, padding: list[int] | None = None) -> None:
        batch = len(self.next)
        k, v, q = (torch.randn(batch, heads, m, DIM) for heads in (HEADS, HEADS, 2 * HEADS))
        positions = torch.full((batch, m), -1, dtype=torch.int32)
        for row in range(batch):
            first = 0 if padding is None else padding[row]
            for i in range(first, m):
                positions[row, i] = self.next[row]
                self.next[row] += 1
                for head in range(HEADS):
                    self.regions[row * HEADS + head].append(
                        (k[row, head, i, None], v[row, head, i, None], positions[row, i, None])
                    )
        step = Step(q, k, v, positions, 0.3, padding is not None)
        out, _ = self.segment.extend(step, need_lse=False)
        if m == 1 and padding is None:
            assert not mismatch(out, self.truth(q)[0], atol=1e-5, rtol=0)

    def crop(self, tokens: int) -> None:
        self.regions = [region[:-tokens] for region in self.regions]
        self.segment.crop(tokens)

    def truth(self, q):
        parts = []
        for r, region in enumerate(self.regions):
            k, v, _ = (torch.cat(x) for x in zip(*region, strict=True))
            row, head = divmod(r, HEADS)
            parts.append(
                decode_attention(q[row, None, 2 * head : 2 * head + 2], k[None, None], v[None, None], scale=0.3)
            )
        return tuple(torch.cat(x).view(q.shape[:3] + x[0].shape[3:]) for x in zip(*parts, strict=True))

    def check(self) -> None:
        for m in (1, 3, 20):
            q = torch.randn(len(self.next), 2 * HEADS, m, DIM)
            for ours, true in zip(self.segment.attend(q, 0.3), self.truth(q), strict=True):
                assert not mismatch(ours, true, atol=1e-5, rtol=0)
        held = self.segment.stored()
        for r, region in enumerate(self.regions):
            row, head = divmod(r, HEADS)
            real = held.positions[row, head] >= 0
            for ours, true in zip((held.keys, held.values, held.positions), zip(*region, strict=True), strict=True):
                assert torch.equal(ours[row, head][real], torch.cat(true))
        assert self.segment.lengths().flatten().tolist() == [len(region) for region in self.regions]


def test_tokens_come_one_by_one_and_in_blocks_with_padding_and_go():
    torch.manual_seed(0)
    model = Model([[5, 1, 12], [3, 9, 2]])
    model.check()
    for _ in range(11):
        model.append(1)
    model.check()
    model.append(3)
    model.crop(2)  # out of the tails
    model.check()
    model.append(4, padding=[2, 0])
    model.append(1)
    model.check()
    model.crop(3)  # further back than the tails reach
    model.append(1)
    model.check()
    model.append(30)
    model.append(1)
    model.check()


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: type(x).from_state(copy.deepcopy(x.state()))],
)
def test_a_copy_goes_on_by_itself(copied):
    torch.manual_seed(0)
    model = Model([[5, 1, 12]])
    model.append(1)
    other = copy.copy(model)
    other.segment, other.regions = copied(model.segment), [list(region) for region in model.regions]
    other.next = list(model.next)
    for one in (other, model, other):
        one.append(1)
        one.check()
    model.check()


def test_rows_are_chosen_and_tokens_dropped_behind_tails():
    torch.manual_seed(0)
    model = Model([[5, 1, 12], [3, 9, 2]])
    for _ in range(3):
        model.append(1)
    model.segment.take_rows(torch.tensor([1, 1, 0]))
    model.regions = [list(r) for r in (*model.regions[3:], *model.regions[3:], *model.regions[:3])]
    model.next = [103] * 3
    model.check()
    model.append(1)
    index = torch.tensor([0, 2, -1, 3, 500]).expand(3, HEADS, 5)  # no region has so many
    model.segment.keep(index)
    model.regions = [[region[i] for i in (0, 2, 3)] for region in model.regions]
    model.check()
    assert model.segment.k.shape[0] == 27  # tight


@pytest.mark.parametrize("lengths", [[[20, 4, 9]], [[600, 100, 230], [900, 40, 3]], [[1, 1, 1]]])
def test_pages_and_tails_idle_in_less_than_an_eighth(lengths):
    model = Model(lengths)
    for _ in range(40):
        model.append(1)
        tokens = model.segment.lengths().float()
        slack = tokens.numel() * max(8, float(tokens.mean()) / 8)
        assert model.segment.k.shape[0] - float(tokens.sum()) < slack
