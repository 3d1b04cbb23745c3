"""What a text model under a cache method can still do: recall facts from a long prompt, and predict the text after it.

Two measurements, both on batches of equal length and through the public interface (a cache beside the model, ours or
one of transformers' own): `recall` asks for a fact of the prompt by greedy decoding; `continuation` feeds the text that
follows a compressed prompt and compares logits and attention outputs with the full cache's. Commands build tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textkv import MethodCache, models, use
from textkv.kinds import text_model
from textkv.mini.filler import Filler
from textkv.mini.speller import Speller
from textkv.mini.tasks import EVALUATION_FILLER, FIRST_EVALUATION_SEED, Example, make_example
from textkv.records import read_text

from .biased import PLACEMENTS, biased_mini
from .quantized import ForeignCache, open_cache

BATCH_TOKENS = 8_192  # prompts that run together; more gains nothing on a CPU
FULL = "full"
BIASED = "biased:"
MODEL_HELP = "mini (embedded), smollm2, gemma3-270m (python -m textkv.models list), a folder, or a hub id"


def load_text_model(
    name: str, device: str = "cpu", dtype: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) of a name that `textkv.models.resolve` knows or of "biased:even" (see `eval.biased`); `dtype`
    None = float32 on a CPU or for a biased model, else bfloat16.

    Raises:
        FileNotFoundError: not installed, no such folder, or nothing to load there.
        ValueError: unknown placement of a bias, or a model that decodes no text.
    """
    check_model(name)
    if name.startswith(BIASED):
        model, tokenizer = biased_mini(name.removeprefix(BIASED))
        return model.to(device, getattr(torch, dtype or "float32")), tokenizer
    kind = getattr(torch, dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    return models.load(name, dtype=kind, device=device)


def check_positions(model: PreTrainedModel, length: int, more: int) -> None:
    """Raises ValueError if a prompt of `length` tokens and `more` behind it are more than the model knows."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if known and length + more > known:
        raise ValueError(f"length={length}: the model knows {known} positions; use {known - more} or less")


def check_model(name: str) -> None:
    """Raises FileNotFoundError, with the mend, if there is no such model here, ValueError for an unknown placement of a
    bias: before anything is measured.
    """
    if name.startswith(BIASED):
        if name.removeprefix(BIASED) not in PLACEMENTS:
            raise ValueError(f"model {name}: no such placement; use {BIASED}{f' or {BIASED}'.join(PLACEMENTS)}")
        name = "mini"
    models.resolve(name)


def held(cache: MethodCache | ForeignCache, rows: int) -> dict[str, float]:
    """What the cache held right after the prompt, per sequence of a batch of `rows`; "kv_bits" per key or value element
    of a token seen, bookkeeping included."""
    rest = cache.at_rest
    return {
        "kv_bits": 8 * rest.kv_bytes / rest.full_bytes * cache.layers[0].dtype.itemsize,
        "kv_bytes": rest.kv_bytes / rows,
        "kv_bytes_full": rest.full_bytes / rows,
        "kv_bytes_peak": cache.peak_bytes / rows,
        "host_bytes": rest.host_bytes / rows,
        "tokens_stored": rest.tokens_stored,
        **{f"seconds_{hook}": seconds / rows for hook, seconds in cache.seconds.items()},
    }


def examples(
    tokenizer: PreTrainedTokenizerBase, task: str, length: int, n: int, depth: float | None = None
) -> list[Example]:
    """`n` held-out examples of one task and length."""
    return [make_example(task, length, FIRST_EVALUATION_SEED + k, tokenizer, depth) for k in range(n)]


@torch.inference_mode()
def recall(
    model: PreTrainedModel, method: str, budget: str, asked: Sequence[Example]
) -> tuple[list[bool], dict[str, float]]:
    """(whether each answer was right in every token, mean of `held`). Prompts and answers have one length each."""
    use(model)
    right: list[bool] = []
    figures: list[dict[str, float]] = []
    size = max(1, BATCH_TOKENS // len(asked[0].prompt_ids))
    for first in range(0, len(asked), size):
        part = asked[first : first + size]
        prompts = torch.from_numpy(np.stack([e.prompt_ids for e in part])).to(model.device)
        wanted = np.stack([e.answer_ids for e in part])
        cache = open_cache(model, method, budget)
        length = {"max_new_tokens": wanted.shape[1], "min_new_tokens": wanted.shape[1], "do_sample": False}
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), past_key_values=cache, **length)
        right += (out[:, prompts.shape[1] :].cpu().numpy() == wanted).all(1).tolist()
        figures += [held(cache, len(part))] * len(part)
    return right, mean_of(figures)


def mean_of(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of every figure."""
    return {name: float(np.mean([row[name] for row in figures])) for name in figures[0]}


@dataclass(frozen=True)
class Continuation:
    """How the text after a prompt looked: `nll` [batch, tokens] negative log-likelihoods in nats, fp32 `logits` [batch,
    tokens, vocabulary], attention outputs per layer [batch, tokens, hidden], and what was held.
    """

    nll: torch.Tensor
    logits: torch.Tensor
    outputs: tuple[torch.Tensor, ...]
    held: dict[str, float]

    def error(self, truth: Continuation) -> float:
        """Mean over layers of |ours - truth| / |truth| of the attention outputs, tokens and channels together."""
        pairs = zip(self.outputs, truth.outputs, strict=True)
        return float(np.mean([((a - b).norm() / b.norm()).item() for a, b in pairs]))

    def logit_error(self, truth: Continuation) -> float:
        """|ours - truth| / |truth| of the logits, each token's without their mean, which no softmax sees."""
        ours, theirs = (x - x.mean(-1, keepdim=True) for x in (self.logits, truth.logits))
        return ((ours - theirs).norm() / theirs.norm()).item()


@torch.inference_mode()
def continuation(model: PreTrainedModel, method: str, budget: str, rows: torch.Tensor, prompt: int) -> Continuation:
    """Compress the first `prompt` tokens of `rows` int64 [batch, n] and look at the rest, fed in one forward."""
    use(model)
    rows = rows.to(model.device)
    cache = open_cache(model, method, budget)
    first = model(rows[:, :prompt], past_key_values=cache, logits_to_keep=1).logits
    figures = held(cache, len(rows))
    with _attention_outputs(model) as outputs:
        rest = model(rows[:, prompt:-1], past_key_values=cache).logits
    logits = torch.cat([first, rest], 1).float()
    nll = F.cross_entropy(logits.flatten(0, 1), rows[:, prompt:].flatten(), reduction="none").view(len(rows), -1)
    return Continuation(nll, logits, tuple(outputs), figures)


@contextmanager
def _attention_outputs(model: PreTrainedModel):
    seen: list[torch.Tensor] = []
    hooks = [
        block.self_attn.register_forward_hook(lambda module, args, out: seen.append(out[0].float()))
        for block in text_model(model).layers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def text_ids(tokenizer: PreTrainedTokenizerBase, text: Path | None) -> np.ndarray:
    """Ids int64 of a text's last tenth (the embedded model never saw it), or of held-out plain sentences."""
    if text is None:
        return Filler.grammar(Speller(tokenizer), EVALUATION_FILLER).ids
    whole = read_text(text)
    return np.asarray(tokenizer(whole[-len(whole) // 10 :], add_special_tokens=False)["input_ids"], dtype=np.int64)


def text_rows(tokenizer: PreTrainedTokenizerBase, text: Path | None, count: int, length: int) -> torch.Tensor:
    """int64 [count, length]: evenly spaced pieces of `text_ids`, each after the start token if there is one.

    Raises:
        ValueError: the text is shorter than one piece.
    """
    ids, start = text_ids(tokenizer, text), Speller(tokenizer).start
    body = length - len(start)
    if len(ids) < body:
        raise ValueError(f"the text has {len(ids)} tokens to measure on, {body} are needed; give a longer one")
    begins = np.linspace(0, len(ids) - body, count).astype(int)
    return torch.from_numpy(np.stack([np.concatenate([start, ids[b : b + body]]) for b in begins]).astype(np.int64))


def share(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with "kv_share"."""
    return row | {"kv_share": row["kv_bytes"] / row["kv_bytes_full"]}
