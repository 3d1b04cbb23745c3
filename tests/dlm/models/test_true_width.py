"""LLaDA-8B at its full width and vocabulary, two layers, random bf16 weights in two shards: loads and computes.

Needs about 3 GB of disk, 4 GiB of memory and a minute: runs only with DLM_TRUE_WIDTH=1.
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import pytest
import torch

from dlm.models import load_model
from tests.dlm.models import slow
from tests.dlm.models.checkpoints import LLADA, shapes, write

PUBLISHED = {
    "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288, "vocab_size": 126464,
    "embedding_size": 126464, "max_sequence_length": 4096, "mask_token_id": 126336, "eos_token_id": 126081,
    "pad_token_id": 126081, "torch_dtype": "bfloat16",
}  # fmt: skip


def cheap_state(config: dict) -> dict[str, torch.Tensor]:
    """Noise of prime length laid end to end: no two rows alike, and made in seconds."""
    noise = torch.randn(1_048_583, generator=torch.Generator().manual_seed(0))
    state = {}
    for name, shape in shapes(config).items():
        flat = torch.empty(shape, dtype=torch.bfloat16).view(-1)
        block = (noise * shape[-1] ** -0.5 if len(shape) == 2 else 1 + 0.1 * noise).bfloat16()
        for start in range(0, flat.numel(), block.numel()):
            part = flat[start : start + block.numel()]
            part.copy_(block[: part.numel()])
        state[name] = flat.view(shape)
    return state


@pytest.mark.skipif(os.environ.get("DLM_TRUE_WIDTH") != "1", reason="3 GB of disk and a minute; set DLM_TRUE_WIDTH=1")
def test_two_layers_of_llada_8b(tmp_path: Path) -> None:
    config = LLADA | PUBLISHED
    write(tmp_path, config, cheap_state(config), shards=2)
    begin = time.perf_counter()
    model, _ = load_model(tmp_path)
    loaded = time.perf_counter()
    assert sum(p.numel() for p in model.parameters()) == 1_472_221_184 and model.dtype == torch.bfloat16
    ids = [126080, 17, 4711, 99999, 126336, 126336]
    with torch.no_grad():
        got = model(torch.tensor([ids]), logits_rows=torch.tensor([[4, 5]])).logits[0]
    computed = time.perf_counter()
    assert got.shape == (2, 126464)
    head = "model.transformer.ff_out.weight"  # every 25th token: the reference works in float64
    state = model.state_dict() | {head: model.state_dict()[head][::25]}
    expected, got = slow.logits(state, slow.llada(heads=32, layers=2), ids)[4:], got[:, ::25]
    assert torch.nn.functional.cosine_similarity(got.double(), expected).min() > 0.999
    assert (got.double() - expected).pow(2).mean().sqrt() < 0.03 * expected.pow(2).mean().sqrt()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"loaded in {loaded - begin:.1f} s, one forward in {computed - loaded:.1f} s, peak {peak:.1f} GiB")
