"""KVCrush by pages, as paged caches need it, and as OpenVINO runs it."""

import torch

from tests.textkv.methods.test_kvcrush import BASE, choose, crush
from textkv.methods.kvcrush import KVCrush, KVCrushOfficial


def test_whole_pages_go_and_the_ragged_one_stays():
    scores = torch.rand(1, 2, 22, generator=torch.Generator().manual_seed(4))
    for slots in choose(crush(ratio=0.5, page=4), scores, 12)[0]:
        assert set(slots) >= {20, 21} and len(slots) == 2 + 8  # 10 tokens beside the last page are two pages
        assert all({s // 4 * 4 + i for i in range(4)} <= set(slots) for s in slots if s < 20)


def test_a_page_scores_as_the_sum_of_its_tokens():
    scores = torch.tensor([[[9.0, 0, 4, 4, 3, 3, 5, 5]]])
    assert choose(crush(ratio=0.1, page=2), scores, 4)[0] == [[0, 1, 6, 7]]


def test_signatures_of_pages_by_hand():
    """Pages of two, one head, bits 11 00 10 01 10 00: D to 01 is 1 1 2 0 2 1."""
    scores = torch.tensor([[[9.0, 8, 0, 0, 7, 0, 0, 6, 5, 0, 0, 1]]])
    # Important: page 0. The others by distance: 3 (0), 1 (1), 5 (1), 2 (2), 4 (2); two of five are ranks 0 and 4.
    found = choose(crush(ratio=0.67, page=2, bit_quantile=0.55), scores, 6)[0]
    assert found == [[0, 1, 6, 7, 8, 9]]


def test_regions_shorter_than_a_page_are_left_to_the_scorer():
    scores = torch.rand(1, 2, 7)
    base = scores.topk(4, dim=-1).indices.sort().values[0].tolist()
    assert choose(crush(ratio=0.5, page=8), scores, 4)[0] == base


def test_where_no_page_fits_beside_the_protected_ones_the_scorer_chooses():
    """Pages of 8: the first, the two touched by the last 16 of 62 tokens and the ragged one hold 30; 37 leave none."""
    scores = torch.rand(1, 2, 62, generator=torch.Generator().manual_seed(5))
    method = crush(ratio=0.5, page=8, start=8, recent=16)
    base = scores.topk(37, dim=-1).indices.sort().values[0].tolist()
    assert choose(method, scores, 37)[0] == base
    for slots in choose(method, scores, 38)[0]:
        assert len(slots) == 38 and set(slots) >= {*range(8), *range(40, 62)}


def test_official_by_hand():
    """Blocks of two, first and last one protected, bits of the heads' mean, steps of whole numbers."""
    mean = torch.tensor([0.0, 0, 9, 9, 8, 0, 0, 7, 0, 0, 1, 2, 0, 0])
    scores = torch.stack([mean * 2, mean * 0])[None]
    method = KVCrushOfficial(inner=BASE, page=2, start=2, recent=2, anchor="zeros", ratio=0.67)
    # Blocks 1..5 compete: signatures 11 10 01 00 11 (the five best tokens). Important: block 1. The others by distance:
    # 4 (0), 2 (1), 3 (1), 5 (2); two of four in steps of two: 4 and 3.
    assert choose(method, scores, 10)[0] == [[0, 1, 2, 3, 6, 7, 8, 9, 12, 13]] * 2
    reaching = KVCrush(inner=BASE, page=2, start=2, recent=2, anchor="zeros", ratio=0.67, heads="summed")
    assert choose(reaching, scores, 10)[0] == [[0, 1, 2, 3, 8, 9, 10, 11, 12, 13]] * 2


def test_official_sizes_are_openvinos():
    """960 tokens and 2 blocks: 25 important blocks and 2 representatives beside the first and last areas."""
    scores = torch.rand(1, 2, 2048, generator=torch.Generator().manual_seed(0))
    slots = choose(KVCrushOfficial(inner=BASE, ratio=0.0741), scores, 1024)[0][0]
    assert len(slots) == 1024 and slots[:32] == list(range(32)) and slots[-128:] == list(range(1920, 2048))
    worth = scores.mean(1)[0].view(64, 32).sum(-1)[1:60]
    important = set((worth.topk(25).indices + 1).tolist())
    blocks = {s // 32 for s in slots} - {0, 60, 61, 62, 63}
    assert important <= blocks and len(blocks - important) == 2
