"""`python -m eval.agentnetbench.flops`: what one decoded token costs with and without a compressed cache.

By formula (a multiplication and an addition are 2 FLOPs; norms, softmax and rotations are left out), and counted by
PyTorch's own counter while a token is decoded through a few layers of Qwen2.5-VL-7B's width with random weights. The
attention module is its projections, QK and AV: what GUI-KV's 38.9 % (arXiv 2510.00536; budget 0.4, five screenshots) is
a share of. The whole model, MLPs and vocabulary included, saves far less of its work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.initialization import no_init_weights

from agentkv.tables import stdout_console
from textkv import MethodCache, use
from textkv.arguments import budget, methods
from textkv.command import count, results_file, run, token_count, write_rows
from textkv.devices import check_room
from textkv.provenance import run_meta

from ..arguments import checked_budget

SCREENSHOT, SCREENSHOTS, TOKENS = 1196, 5, 7550  # a screen of 1280x720 px; five of them, and 1570 tokens of text


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes: what its FLOPs depend on."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Shape | None:
        """The shape of a plain decoder with gated MLPs; None for experts and for layers of another kind, which these
        formulas do not describe.
        """
        text = config.get_text_config()
        experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        if experts or kinds != {"full_attention"}:
            return None
        heads = text.num_attention_heads
        return cls(
            text.num_hidden_layers, text.hidden_size, heads, text.num_key_value_heads,
            getattr(text, "head_dim", None) or text.hidden_size // heads, text.intermediate_size, text.vocab_size,
        )  # fmt: skip

    def attention(self, tokens: float) -> float:
        """FLOPs of all attention modules for one token that attends to `tokens` (mean over layers and heads)."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.layers * (4 * self.hidden * (query + key) + 4 * query * tokens)

    def model(self, tokens: float) -> float:
        """FLOPs of the whole decoder for one token, MLPs and vocabulary included."""
        rest = self.layers * 6 * self.hidden * self.mlp + 2 * self.hidden * self.vocabulary
        return self.attention(tokens) + rest


QWEN_7B = Shape(28, 3584, 28, 4, 128, 18944, 152064)
"""Qwen2.5-VL-7B and UI-TARS-1.5-7B, their language model."""


def built(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A decoder of that shape with weights of no meaning: FLOPs do not depend on them."""
    config = Qwen2Config(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, max_position_embeddings=32768, use_cache=True,
    )  # fmt: skip
    with no_init_weights():
        model = Qwen2ForCausalLM._from_config(config, dtype=dtype)
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.fill_(1e-3 * (1 + number % 7))
        model.get_input_embeddings().weight.normal_(generator=torch.Generator().manual_seed(0))
    return use(model.eval())


def spans_of(tokens: int, screenshots: int, each: int) -> list[tuple[int, int]]:
    """Where the screenshots of a prompt lie: some text before each, the rest behind the last."""
    gap = (tokens - screenshots * each) // (screenshots + 1)
    if gap < 2:
        raise ValueError(f"tokens={tokens} hold no {screenshots} screenshots of {each} tokens with text between them")
    return [(gap * (i + 1) + each * i, (gap + each) * (i + 1)) for i in range(screenshots)]


@torch.inference_mode()
def counted(
    model: PreTrainedModel, method: str, budget: str, tokens: int, spans: Sequence[tuple[int, int]]
) -> dict[str, float]:
    """FLOPs that PyTorch counts in one decoded token after a prompt of random ids: `attention` in the attention
    modules, `model` in all.
    """
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    cache = MethodCache(model, method, budget)
    # In what grid they lie changes no count.
    cache.begin(ids, spans=[list(spans)], grids=[[(1, end - start) for start, end in spans]])
    model(ids, past_key_values=cache, logits_to_keep=1)
    with FlopCounterMode(display=False, custom_mapping=_CPU) as counter:
        model(ids[:, -1:], past_key_values=cache)
    counts = {name: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    attention = sum(count for name, count in counts.items() if name.endswith(".self_attn"))
    return {"attention": attention, "model": counts["Global"], "tokens": cache.at_rest.tokens_stored}


def _attended(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    """QK and AV of a fused attention; arguments are shapes [batch, heads, tokens, head_dim]."""
    return 2 * query[0] * query[1] * query[2] * key[2] * (query[3] + value[3])


# PyTorch's counter knows the fused attention of GPUs only.
_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attended}


def rows_of(shape: Shape, methods: Sequence[str], budget: str, tokens: int, layers: int) -> list[dict[str, Any]]:
    """One row per method and way: `how` = formula, at the shape's own layers; counted, at `layers` of them.

    FLOPs are of the first token after the prompt, which attends to itself too; cuts are shares of the full cache's.
    """
    spans = spans_of(tokens, SCREENSHOTS, SCREENSHOT)
    cut = replace(shape, layers=layers)
    model = built(cut)
    full = counted(model, "full", "1.0", tokens, spans)
    rows = []
    for method in methods:
        seen = counted(model, method, budget, tokens, spans)
        about = {"method": method, "budget": budget, "prefill_tokens": tokens, "tokens_stored": seen["tokens"]}
        told = [f(n + 1) for f in (shape.attention, shape.model) for n in (seen["tokens"], tokens)]
        rows.append(about | {"how": "formula", "layers": shape.layers} | _row(*told))
        told = [seen["attention"], full["attention"], seen["model"], full["model"]]
        rows.append(about | {"how": "counted", "layers": layers} | _row(*told))
    return rows


def _row(attention: float, attention_full: float, model: float, model_full: float) -> dict[str, float]:
    return {
        "decode_flops_attention": attention, "decode_flops_attention_full": attention_full,
        "decode_flops": model, "decode_flops_full": model_full,
        "cut_attention": 1 - attention / attention_full, "cut_model": 1 - model / model_full,
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows, and what they save."""
    made = Table("method", "how", "layers", "tokens stored", "attention module", "saved", "whole model", "saved")
    for row in rows:
        made.add_row(
            row["method"], row["how"], str(row["layers"]), f"{row['tokens_stored']:.0f}",
            f"{row['decode_flops_attention'] / 1e6:.1f} MFLOP", f"{row['cut_attention']:.1%}",
            f"{row['decode_flops'] / 1e9:.2f} GFLOP", f"{row['cut_model']:.1%}",
        )  # fmt: skip
    return made


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.agentnetbench.flops", description=__doc__.split("\n\n")[0])
    p.add_argument("--method", type=methods(), default="gui-kv", help="comma-separated methods (default gui-kv)")
    p.add_argument(
        "--budget", type=budget, default="0.4", help="share of the prompt to keep, or a number of tokens as 64t"
    )
    p.add_argument(
        "--tokens", type=token_count, default=TOKENS, help=f"tokens of the prompt, five screenshots ({TOKENS})"
    )
    p.add_argument("--layers", type=count, default=1, help="layers that are counted (default 1: full width takes time)")
    p.add_argument("--json", type=results_file("eval.agentnetbench.flops"), help="write the rows here")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see `textkv.command.run` for what it returns."""
    return run("eval.agentnetbench.flops", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Count and print."""
    budget = checked_budget(args.method, args.budget)
    spans_of(args.tokens, SCREENSHOTS, SCREENSHOT)
    shape, asked = QWEN_7B, f"--layers {args.layers} --tokens {args.tokens}"
    weights, kept = 3 * shape.hidden * shape.mlp, shape.hidden * args.tokens  # of a layer, at least, and of the prompt
    check_room("cpu", 4 * (args.layers * weights + kept), asked)
    rows = rows_of(shape, args.method, budget, args.tokens, args.layers)
    write_rows(args.json, run_meta("eval.agentnetbench.flops", argv, 0), rows)
    stdout_console().print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
