"""Tensor parallelism: two processes share a tiny model's heads, and every head keeps what it keeps in one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.textkv import sharded

SHARDS = 2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(6)
    return model


@pytest.fixture(scope="module")
def shards(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={SHARDS}", f"--master_port={port}"]
    command += ["-m", "tests.textkv.sharded", str(folder / "model"), str(folder / "told")]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads((folder / f"told.{rank}").read_text()) for rank in range(SHARDS)]


@pytest.mark.parametrize("method", sharded.apart())
def test_each_head_keeps_what_it_keeps_in_one_process(method, model, shards):
    whole = sharded.told(model, method)
    for rank, part in enumerate(shards):
        assert part[method]["tokens"] == whole["tokens"]
        for own, all_heads in zip(part[method]["kept"], whole["kept"], strict=True):
            first = rank * len(own)
            assert own == all_heads[first : first + len(own)]


@pytest.mark.parametrize("method", sharded.COMPARE)
def test_what_compares_heads_is_refused(method, shards):
    for part in shards:
        assert "tensor parallelism" in part[method] and "\n" not in part[method]
