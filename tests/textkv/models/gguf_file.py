"""A GGUF file of a few kilobytes: a Llama of one layer with a byte-level tokenizer, Q8_0."""

from __future__ import annotations

from pathlib import Path

import torch

HIDDEN, HEADS, MIDDLE = 64, 2, 64


def write_gguf(path: Path) -> torch.Tensor:
    """Writes the file and returns the embeddings fp32 [vocabulary, hidden] that went into it."""
    import gguf  # part of an extra: callers skip without it
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    torch.manual_seed(0)
    letters = list(bytes_to_unicode().values())
    words = [*letters, letters[0] + letters[1], "<s>", "</s>"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * (len(letters) + 1) + [3, 3])
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_bos_token_id(len(letters) + 1)
    writer.add_eos_token_id(len(letters) + 2)
    embeddings = torch.randn(len(words), HIDDEN) * 0.02
    kv = HIDDEN // HEADS
    square = {
        "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN), "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (MIDDLE, HIDDEN), "ffn_up": (MIDDLE, HIDDEN), "ffn_down": (HIDDEN, MIDDLE),
    }  # fmt: skip
    tensors = {"token_embd.weight": embeddings, "output_norm.weight": torch.ones(HIDDEN)}
    tensors |= {f"blk.0.{name}.weight": torch.randn(shape) * 0.02 for name, shape in square.items()}
    tensors |= {f"blk.0.{name}.weight": torch.ones(HIDDEN) for name in ("attn_norm", "ffn_norm")}
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in tensors.items():
        data = tensor.numpy()
        if tensor.dim() == 2:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return embeddings
