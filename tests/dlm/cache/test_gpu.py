"""On CUDA every policy writes the tokens that it writes on the CPU (fp32)."""

from __future__ import annotations

import pytest
import torch

from dlm.decode import decode
from tests.dlm.toys import dream, llada, prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False"),
]

CACHES = [
    "none", "freecache", "prefix", "dual", "dual('commit_first')", "dkv", "dllm-cache", "freecache+snapkv(0.5)",
    "freecache+snapkv(0.5)+adakv", "freecache+kivi(8)",
]  # fmt: skip


@pytest.mark.parametrize("make", [llada, dream])
@pytest.mark.parametrize("cache", CACHES)
def test_same_tokens_as_on_the_cpu(make, cache):
    model, (ids, mask) = make(), prompts(70, 80)
    rows = slice(1, 2) if "adakv" in cache else slice(None)  # per-head budgets take no padding later on
    options = dict(gen_length=12, block_length=4, cache=cache, unmask="threshold(0.4)", eos="none")
    wanted = decode(model, ids[rows], mask[rows], **options)
    got = decode(model.cuda(), ids[rows].cuda(), mask[rows].cuda(), **options)
    assert got.ids.tolist() == wanted.ids.tolist()
    assert got.stats.query_tokens == wanted.stats.query_tokens
