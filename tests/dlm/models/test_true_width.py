"""LLaDA-8B and Dream-7B at full width and vocabulary, two layers, random bf16 weights in two shards: load, compute, and
generate by the command.

Needs about 3 GB of disk, 8 GiB of memory and a minute each: runs only with DLM_TRUE_WIDTH=1; `-s` prints the figures.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dlm.decode import decode
from dlm.models import chat_ids, load_model
from tests.dlm.models import slow
from tests.dlm.models.checkpoints import DREAM, LLADA, shapes, write

PUBLISHED = {
    "llada": LLADA | {
        "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288, "vocab_size": 126464,
        "embedding_size": 126464, "max_sequence_length": 4096, "mask_token_id": 126336, "eos_token_id": 126081,
        "pad_token_id": 126081, "torch_dtype": "bfloat16",
    },
    "Dream": DREAM | {
        "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
        "vocab_size": 152064, "max_position_embeddings": 131072, "mask_token_id": 151666, "bos_token_id": 151643,
        "eos_token_id": 151643, "pad_token_id": 151643, "torch_dtype": "bfloat16",
    },
}  # fmt: skip
GRAPHS = {"llada": slow.llada(heads=32, layers=2), "Dream": slow.dream(heads=28, kv_heads=4, layers=2)}
PARAMETERS = {"llada": 1_472_221_184, "Dream": 1_556_113_920}
SLOT_BYTES = {"llada": 512 * 1024 // 32, "Dream": 56 * 1024 // 28}  # keys and values of a slot and layer
GEN, BLOCK = 4, 2


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


def write_tokenizer(folder: Path, family: str) -> None:
    """Bytes, fillers, and the special tokens at their published ids, in the files that the family ships."""
    size = {"llada": 126_080, "Dream": 151_643}[family]
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate([*words, *(f"w{i}" for i in range(len(words), size))])}
    if family == "Dream":
        names = {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>"}
        added = {str(size + i): {"content": names.get(i, f"<|{i}|>"), "special": True} for i in range(22)}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        declared = {"added_tokens_decoder": added, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(declared | {"tokenizer_class": "DreamTokenizer"}))
        return
    names = {126080: "<|startoftext|>", 126081: "<|endoftext|>", 126336: "<|mdm_mask|>"}
    names |= {126346: "<|start_header_id|>", 126347: "<|end_header_id|>", 126348: "<|eot_id|>"}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(names.get(i, f"<|{i}|>"), special=True) for i in range(size, 126_349)])
    tokenizer.save(str(folder / "tokenizer.json"))
    declared = {"bos_token": names[126080], "eos_token": names[126081], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(declared))


def equals_the_slow_reference(model, family: str) -> None:
    ids, head = (
        [17, 99999, model.decoding_spec.mask_id],
        {"llada": "model.transformer.ff_out.weight", "Dream": "lm_head.weight"},
    )
    with torch.no_grad():
        got = model(torch.tensor([ids]), logits_rows=torch.tensor([[2]])).logits[0, :, ::25]
    weights = model.state_dict()
    weights = weights | {head[family]: weights[head[family]][::25]}  # every 25th token: the reference is in float64
    expected = slow.logits(weights, GRAPHS[family], ids)[2:]
    assert torch.nn.functional.cosine_similarity(got.double(), expected).min() > 0.999
    assert (got.double() - expected).pow(2).mean().sqrt() < 0.03 * expected.pow(2).mean().sqrt()


def command(folder: Path, cache: str) -> tuple[dict, float, float]:
    """The row of `python -m dlm.generate` in a process of its own, that process's processor seconds and peak GiB."""
    out, peak = folder / "row.json", 0
    words = ["--model", str(folder), "--prompt", "2+2", "--chat", "--dtype", "bfloat16", "--device", "cpu"]
    words += ["--gen-length", str(GEN), "--block-length", str(BLOCK), "--eos", "none", "--cache", cache]
    words = [sys.executable, "-m", "dlm.generate", *words, "--json", str(out)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as run:
        while run.poll() is None:
            # Not ru_maxrss: that one begins with what this process holds.
            found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{run.pid}/status").read_text())
            peak = max(peak, int(found[1])) if found else peak
            time.sleep(0.2)
    assert run.returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(out.read_text())["rows"][0], seconds, peak / 2**20


@pytest.mark.skipif(os.environ.get("DLM_TRUE_WIDTH") != "1", reason="3 GB of disk and a minute; set DLM_TRUE_WIDTH=1")
@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_two_layers_load_and_generate(tmp_path: Path, family: str) -> None:
    config = PUBLISHED[family]
    write(tmp_path, config, cheap_state(config), shards=2)
    write_tokenizer(tmp_path, family)
    begin = time.process_time()
    model, tokenizer = load_model(tmp_path)
    loaded = time.process_time() - begin
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[family] and model.dtype == torch.bfloat16
    prompt = chat_ids(tokenizer, [{"role": "user", "content": "2+2"}])
    equals_the_slow_reference(model, family)
    options = {"gen_length": GEN, "block_length": BLOCK, "eos": "none"}
    begin = time.process_time()
    plain = decode(model, torch.tensor([prompt]), cache="none", **options).stats
    generated = time.process_time() - begin
    assert (plain.forwards, plain.query_tokens) == (GEN, GEN * (len(prompt) + GEN))
    row, seconds, peak = command(tmp_path, "freecache")
    tokens = len(prompt) + GEN * (GEN + BLOCK) // 2 + BLOCK + model.decoding_spec.shift * (GEN - 1)
    assert (row["forwards"], row["query_tokens"], row["tokens"] <= GEN) == (GEN, tokens, True)
    assert row["cache_bytes"] == (len(prompt) + GEN) * 2 * SLOT_BYTES[family]
    print(
        f"\n{family}: {len(prompt)} + {GEN} tokens; processor seconds: load {loaded:.1f}, no cache {generated:.2f}; "
        f"the command with freecache {seconds:.1f} in all, {row['seconds']:.2f} of wall time in the loop, peak "
        f"{peak:.2f} GiB"
    )
