"""Decoding as a library call: `decode` gives whole answers, `stream` gives text as soon as it will not change any more.

    done = decode(model, ids, gen_length=16)
    for piece in stream(model, ids, gen_length=64, tokenizer=tokenizer): print(piece.text, end="")

The calls that equal the authors' own:

    # LLaDA: generate(model, ids, steps=128, gen_length=128, block_length=32)
    decode(model, ids, gen_length=128, block_length=32, cache="none", eos="none")
    # Dream: diffusion_generate(ids, alg="entropy", steps=128, max_new_tokens=128)
    decode(model, ids, gen_length=128, block_length=None, cache="none", eos="none", unmask="entropy(compat=True)")

Where a Dream checkpoint has no generation_config.json, transformers gives the authors' code its own default of
`top_k=50`; ours is None, all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlm.cache import resolve_cache
from dlm.canvas import Canvas
from dlm.config import DecodingConfig, config_of
from dlm.ends import StopStrings, cut_at
from dlm.loop import LogitsHook, Loop, StuckError
from dlm.models.decoding_spec import DecodingSpec
from dlm.prompts import make_canvas, pad_left
from dlm.stats import Decoded, Stats
from dlm.unmask import Guider, Rule, Sampling, resolve_unmask
from dlm.unmask.noise import Generators

__all__ = ["Decoded", "Piece", "Stats", "StuckError", "decode", "decode_prompts", "stream"]


@torch.no_grad()
def decode(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    config: DecodingConfig | None = None,
    *,
    guide: Guider | PreTrainedModel | None = None,
    generator: Generators = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_step: Callable[[Canvas, Stats], None] | None = None,
    logits_hook: LogitsHook | None = None,
    **options: Any,
) -> Decoded:
    """Generates `gen_length` tokens behind each prompt, or fills the masks in it.

    Args:
        model: a diffusion language model of `dlm.models`, or anything with its `decoding_spec` and `forward`.
        input_ids: int64 [batch, P], prompts padded on the left.
        attention_mask: [batch, P], nonzero = real token; None = no padding.
        config: how to decode; None = the defaults of `DecodingConfig`.
        guide: what a guided rule asks: a `Guider`, or a causal model of the same vocabulary.
        generator: of the rule's random numbers. A list with one for each row gives every row the tokens that it would
            draw alone; with one for all, and with torch's own (None), they depend on the other rows. At temperature 0
            rows are those that they are alone in any case, unless the rule itself draws ("random", "origin").
        tokenizer: of the model, for `stop`.
        on_step: called after every forward with the canvas and the statistics so far. The canvas has the rows that were
            unfinished before that forward; `canvas.rows` are their numbers.
        logits_hook: (canvas, slots int64 [batch, r] with -1 = none, logits [batch, r, V]) -> the logits to use; the
            rows are those of `canvas.rows`.
        options: fields of `DecodingConfig` (gen_length, block_length, steps, cache, unmask, temperature, top_p, top_k,
            cfg_scale, eos, stop, infill), which go before those of `config`.

    Raises:
        ValueError: before the first forward, anything about the request that cannot work.
        TypeError: an option that `DecodingConfig` does not have.
        StuckError: the rule stopped committing tokens.
    """
    for loop in _run(model, input_ids, attention_mask, config_of(config, options), guide, generator, tokenizer,
                     logits_hook):  # fmt: skip
        if on_step is not None and loop.stats.forwards:
            on_step(loop.canvas, loop.report())
    return loop.decoded()


@dataclass(frozen=True)
class Piece:
    """What has become final in one row: its number, int64 tokens [n], and with a tokenizer their text (else None).

    `done` is True for the last piece of a row.
    """

    row: int
    ids: torch.Tensor
    text: str | None
    done: bool


@torch.no_grad()
def stream(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    config: DecodingConfig | None = None,
    *,
    guide: Guider | PreTrainedModel | None = None,
    generator: Generators = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    wanted: Callable[[int], bool] | None = None,
    **options: Any,
) -> Iterator[Piece]:
    """As `decode`, giving out what will not change any more: the written tokens of a row up to its first mask.

    Ends of text are not given out. Text waits while it may still become a stop string, and for the rest of a character.
    Arguments and errors are those of `decode`; errors come with the first piece.

    Args:
        wanted: asked after every forward whether somebody still waits for a row, by its number; one that nobody waits
            for is given up.

    Raises:
        ValueError: also for `infill`, whose text does not grow from the left.
    """
    config = config_of(config, options)
    if config.infill:
        raise ValueError("stream() gives out text from the left, and gaps are filled in any order; use decode()")
    rows: list[_Outlet] = []
    for loop in _run(model, input_ids, attention_mask, config, guide, generator, tokenizer, None):
        canvas = loop.canvas
        if not rows:
            rows = [_Outlet(row, model.decoding_spec, config.stop, tokenizer) for row in range(canvas.batch)]
        final = canvas.written(loop.unmasker.revises).tolist()
        for row, ids, count in zip(canvas.rows.tolist(), canvas.answers.tolist(), final, strict=True):
            if (piece := rows[row].take(ids, count)) is not None:
                yield piece
        if wanted is not None:
            loop.unwanted |= {row for row in canvas.rows.tolist() if not wanted(row)}


class _Outlet:
    """What of one row was given out."""

    def __init__(
        self, row: int, spec: DecodingSpec, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        self.row, self.spec, self.stop, self.tokenizer = row, spec, stop, tokenizer
        self.given, self.text, self.done = 0, "", False

    def take(self, ids: list[int], final: int) -> Piece | None:
        """The next piece of the row's generated part `ids`, whose first `final` stay; None = there is none."""
        if self.done:
            return None  # a block-causal model still fills the block behind the answer
        end = next((i for i, token in enumerate(ids[:final]) if token in self.spec.eos_ids), final)
        done = self.done = final == len(ids)
        fresh, text = ids[self.given : end], None
        self.given = end
        if self.tokenizer is not None:
            whole = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
            cut = cut_at(whole, self.stop)
            ready = cut if cut is not None else whole if done else self._settled(whole)
            text, self.text = ready[len(self.text) :], max(ready, self.text, key=len)
        if not fresh and not text and not done:
            return None
        return Piece(self.row, torch.tensor(fresh, dtype=torch.int64), text, done)

    def _settled(self, text: str) -> str:
        """The part of a growing text that can neither become a stop string nor another character."""
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        held = max(
            (n for stop in self.stop for n in range(1, min(len(stop), len(text)) + 1) if text.endswith(stop[:n])),
            default=0,
        )
        return text[: len(text) - held]


def decode_prompts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: DecodingConfig,
    guide: Guider | None = None,
    seed: int | Sequence[int] = 0,
    on_step: Callable[[Canvas, Stats], None] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Decoded:
    """Answers to `prompts`, lists of ids, on the model's device; errors as `decode`.

    Args:
        guide: asked if the configuration is `guided`, else left alone, so that many configurations may share one.
        seed: of the random numbers: one of each row, whatever rows are beside it; a number means seed + i for row i.
    """
    ids, mask = pad_left(prompts, model.decoding_spec.pad_id, model.device)
    seeds = range(seed, seed + len(prompts)) if isinstance(seed, int) else seed
    generators = [torch.Generator(model.device).manual_seed(one) for one in seeds]
    guide = guide if config.guided else None
    return decode(model, ids, mask, config, guide=guide, generator=generators, on_step=on_step, tokenizer=tokenizer)


def _run(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: DecodingConfig,
    guide: Guider | PreTrainedModel | None, generator: Generators, tokenizer: PreTrainedTokenizerBase | None,
    hook: LogitsHook | None,
) -> Iterator[Loop]:  # fmt: skip
    """The loop of a generation: once before the first forward and once after each."""
    spec = _spec_of(model)
    canvas = make_canvas(config, spec, input_ids, attention_mask)
    stops = StopStrings(config.stop, tokenizer, next(iter(spec.eos_ids), None)) if config.stop else None
    rule, policy = _resolve_rule(config, spec, guide), resolve_cache(config.policy(spec))
    rule.check(config, policy, hook is not None)
    policy.check(spec)
    # Cache before rule: a model that the cache refuses shall not cost a guider the translation of its prompts.
    run = policy.begin(canvas, model)
    loop = Loop(model, config, canvas, rule.begin(canvas, spec, generator, config.forwards), run, stops, hook)
    yield loop
    # Dream's timestep schedule may write nothing in its first steps, so a rule is given up only after as many idle
    # forwards as the longest schedule has steps, and one per token besides.
    tokens = canvas.length - canvas.prompt
    for _ in loop.steps(max(config.forwards or 0, tokens) + tokens + rule.idle, rule.expression):
        yield loop


def _spec_of(model: Any) -> DecodingSpec:
    """The model's facts. Raises ValueError for what is no diffusion language model."""
    if not hasattr(type(model), "decoding_spec") and not hasattr(model, "decoding_spec"):
        what = repr(model) if isinstance(model, str) else f"a {type(model).__name__}"
        raise ValueError(
            f"model is {what}, which has no decoding_spec; give a diffusion language model of dlm.models, as "
            "load_model(folder)[0]"
        )
    return model.decoding_spec


def _resolve_rule(config: DecodingConfig, spec: DecodingSpec, guide: Guider | PreTrainedModel | None) -> Rule:
    if guide is not None:
        config = replace(config, guided=True)
    # A rule that brings its own sampling keeps it unless something else was asked for.
    sampling = None if config.sampling == Sampling() else config.sampling
    return resolve_unmask(config.rule(spec), sampling, guide)
