"""The loop that turns masks into text: ask the rule which slots it wants, the cache which ones to compute, run, commit.

Rule and cache policy know nothing of each other; what they share is the canvas. A step waits for the device once, when
the rows' progress is read. Rows of a batch go on at their own pace and get the tokens that they would get alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from dlm.cache import Plan, Run, resolve_cache
from dlm.canvas import Canvas
from dlm.config import DecodingConfig, config_of
from dlm.models.decoding_spec import DecodingSpec
from dlm.prompts import make_canvas, pad_left
from dlm.unmask import Guider, Rule, Sampling, Unmasker, resolve_unmask

LogitsHook = Callable[[Canvas, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Stats:
    """What a generation cost.

    Attributes:
        forwards: of the model; with classifier-free guidance both halves run in one.
        query_tokens: slots computed, summed over forwards and unfinished rows, padding left out: the sum of what the
            rows would cost alone. Doubled by classifier-free guidance.
        value_tokens: rows whose values alone were computed besides (dLLM-Cache).
        guider_forwards: forwards of the guider.
        row_forwards: forwards, summed over the rows that were unfinished.
        committed: tokens that the rule committed, per row; slots filled behind an end of text are not among them.
        text_tokens: tokens before the first end of text, per row: what a throughput should count.
        seconds: wall time of the loop.
        cache_bytes: bytes that the cache held after the last forward.
        cache_bytes_peak: the most that it held after any forward.
        extra: what the rule reports besides.
    """

    forwards: int = 0
    query_tokens: int = 0
    value_tokens: int = 0
    guider_forwards: int = 0
    row_forwards: int = 0
    committed: list[int] = field(default_factory=list)
    text_tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    cache_bytes: int = 0
    cache_bytes_peak: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that one forward commits in a row that is not finished."""
        return sum(self.committed) / self.row_forwards if self.row_forwards else 0.0

    def columns(self) -> dict[str, Any]:
        """The figures under the names that every table has them by."""
        names = ("forwards", "query_tokens", "guider_forwards", "tokens_per_forward", "seconds")
        return {name: getattr(self, name) for name in (*names, "cache_bytes", "cache_bytes_peak")}


@dataclass(frozen=True)
class Decoded:
    """ids: int64 [batch, G], the generated part, behind an end of text filled with it; stats: what it cost."""

    ids: torch.Tensor
    stats: Stats


class StuckError(RuntimeError):
    """The rule commits nothing any more although masks are left."""


@torch.no_grad()
def decode(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    config: DecodingConfig | None = None,
    *,
    guide: Guider | PreTrainedModel | None = None,
    generator: torch.Generator | None = None,
    on_step: Callable[[Canvas, Stats], None] | None = None,
    logits_hook: LogitsHook | None = None,
    **options: Any,
) -> Decoded:
    """Generates `gen_length` tokens behind each prompt.

    Args:
        model: a diffusion language model of `dlm.models`, or anything with its `decoding_spec` and `forward`.
        input_ids: int64 [batch, P], prompts padded on the left.
        attention_mask: [batch, P], nonzero = real token; None = no padding.
        config: how to decode; None = the defaults of `DecodingConfig`.
        guide: what a guided rule asks: a `Guider`, or a causal model of the same vocabulary.
        generator: of the rule's random numbers.
        on_step: called after every forward with the canvas and the statistics so far.
        logits_hook: (canvas, slots int64 [batch, r] with -1 = none, logits [batch, r, V]) -> the logits to use.
        options: fields of `DecodingConfig` (gen_length, block_length, steps, cache, unmask, temperature, top_p, top_k,
            cfg_scale, eos), which go before those of `config`.

    Raises:
        ValueError: before the first forward, anything about the request that cannot work.
        TypeError: an option that `DecodingConfig` does not have.
        StuckError: the rule stopped committing tokens.
    """
    config = config_of(config, options)
    canvas = make_canvas(config, model.decoding_spec, input_ids, attention_mask)
    rule = _resolve_rule(config, model.decoding_spec, guide)
    # Cache before rule: a model that the cache refuses shall not cost a guider the translation of its prompts.
    run = resolve_cache(config.cache).begin(canvas, model)
    unmasker = rule.begin(canvas, model.decoding_spec, generator, config.steps)
    return _Loop(model, config, canvas, unmasker, run, logits_hook).run_to_end(rule, on_step)


def decode_prompts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: DecodingConfig,
    guide: Guider | None = None,
    seed: int = 0,
    on_step: Callable[[Canvas, Stats], None] | None = None,
) -> Decoded:
    """Answers to `prompts`, lists of ids, on the model's device; errors as `decode`.

    Args:
        guide: asked if the configuration is `guided`, else left alone, so that many configurations may share one.
        seed: of the random numbers.
    """
    ids, mask = pad_left(prompts, model.decoding_spec.pad_id, model.device)
    generator = torch.Generator(model.device).manual_seed(seed)
    guide = guide if config.guided else None
    return decode(model, ids, mask, config, guide=guide, generator=generator, on_step=on_step)


class _Loop:
    """One generation: its parts, and what it has cost so far."""

    def __init__(
        self, model: Any, config: DecodingConfig, canvas: Canvas, unmasker: Unmasker, run: Run, hook: LogitsHook | None
    ) -> None:
        self.model, self.config, self.canvas, self.unmasker, self.run = model, config, canvas, unmasker, run
        self.hook, self.stats = hook, Stats()
        self.ends = torch.tensor(model.decoding_spec.eos_ids, dtype=torch.int64, device=canvas.ids.device)
        self.committed = torch.zeros(canvas.batch, dtype=torch.int64, device=canvas.ids.device)

    def run_to_end(self, rule: Rule, on_step: Callable[[Canvas, Stats], None] | None) -> Decoded:
        """Steps until no mask is left."""
        canvas, config = self.canvas, self.config
        # Dream's timestep schedule may write nothing in its first steps, so a rule is given up only after as many idle
        # forwards as the longest schedule has steps, and one per token besides.
        start, idle, patience = perf_counter(), 0, config.steps + config.gen_length
        while not canvas.done:
            left = int(canvas.left_cpu.sum())
            committed = self.step()
            if config.eos != "none" and len(self.ends):
                committed = committed | end_rows(canvas, self.ends, early=config.eos == "fill")
            # The cache must also learn of slots that an end of text filled: their keys and values are stale now.
            self.run.after(committed)
            idle = idle + 1 if int(canvas.left_cpu.sum()) == left else 0
            if idle > patience:
                raise StuckError(f"{idle} forwards committed nothing; the rule {rule.expression} does not get on")
            if on_step is not None:
                on_step(canvas, self.report(perf_counter() - start))
        return Decoded(canvas.generated.clone(), self.report(perf_counter() - start))

    def step(self) -> torch.Tensor:
        """One forward and what it commits: bool [batch, L]."""
        canvas, run, stats = self.canvas, self.run, self.stats
        slots = self.unmasker.candidates(canvas, run.logit_window())
        forced = run.forced()
        if forced is not None:
            # The rule sees the forced slot alone, so that what it keeps count of agrees with what is committed.
            only = (forced[:, None] >= 0) & (slots != forced[:, None])
            slots = slots.masked_fill(only, -1)
        # After `forced`, which asks what this plan is about to do: planning moves the policy on by one forward.
        plan = run.plan(slots)
        stats.row_forwards += int(canvas.unfinished.sum())
        logits = self._logits(slots, plan)
        if self.hook is not None:
            logits = self.hook(canvas, slots, logits)
        choice = self.unmasker.choose(logits, slots, canvas)
        where = choice.commit if forced is None else choice.commit | (slots == forced[:, None])
        committed = canvas.commit(slots, choice.tokens, where)
        self.committed += committed.sum(1)
        return committed

    def _logits(self, slots: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Logits [batch, r, V] of `slots`, guided by the prompt if asked for."""
        # Row j predicts slot j + shift, so the row that is read stands one before its slot in a Dream.
        canvas, rows = self.canvas, plan.rows(slots - self.canvas.shift)
        ids, positions = canvas.ids, canvas.position_ids
        if self.config.cfg_scale:
            # Both halves in one forward: the cache holds their rows side by side, and one plan serves both.
            unguided = ids.clone()
            unguided[:, : canvas.prompt] = canvas.mask_id
            ids, positions, rows = torch.cat([ids, unguided]), positions.repeat(2, 1), rows.repeat(2, 1)
            plan = plan.doubled()
        cache, stats = self.run.cache, self.stats
        if cache is not None:
            cache.plan = plan
        stats.forwards += 1
        stats.query_tokens += plan.tokens
        stats.value_tokens += plan.value_tokens
        logits = self.model(
            plan.pick(ids), position_ids=plan.pick(positions), past_key_values=cache, logits_rows=rows,
            attention_mask=plan.visible if cache is not None or plan.visible is None else plan.pick(plan.visible),
        ).logits  # fmt: skip
        stats.cache_bytes = 0 if cache is None else cache.kv_bytes()
        stats.cache_bytes_peak = max(stats.cache_bytes_peak, stats.cache_bytes)
        if not self.config.cfg_scale:
            return logits
        # Unsupervised guidance as in LLaDA (arXiv 2502.09992): (1 + w) log p(x | prompt) - w log p(x), on raw logits.
        given, alone = logits.chunk(2)
        return alone + (self.config.cfg_scale + 1) * (given - alone)

    def report(self, seconds: float) -> Stats:
        """The statistics up to now."""
        rule = dict(self.unmasker.stats)
        # True from a row's first end on: a running maximum needs no loop and no wait for the device.
        ended = torch.isin(self.canvas.generated, self.ends).int().cummax(1).values.bool()
        return replace(
            self.stats, seconds=seconds, committed=self.committed.tolist(),
            text_tokens=(~ended & (self.canvas.generated != self.canvas.mask_id)).sum(1).tolist(),
            guider_forwards=rule.pop("guider_forwards", 0), extra=rule,
        )  # fmt: skip


def end_rows(canvas: Canvas, ends: torch.Tensor, early: bool) -> torch.Tensor:
    """Fills what lies behind a row's first end of text with that token: bool [batch, L], slots that changed.

    Args:
        ends: int64 [k], the tokens that end a text.
        early: at once; False = only when no mask is left before the end.
    """
    written = canvas.generated
    is_end = torch.isin(written, ends)
    # argmax gives the first of equal values; a row without an end gives 0, which `ended` masks below.
    first = is_end.int().argmax(1, keepdim=True)
    ended = is_end.any(1)
    if not early:
        before = torch.arange(written.shape[1], device=written.device)[None] < first
        ended = ended & ~((written == canvas.mask_id) & before).any(1)
    return canvas.finish_row(
        (canvas.prompt + first[:, 0]).masked_fill(~ended, canvas.length), written.gather(1, first)[:, 0]
    )


def _resolve_rule(config: DecodingConfig, spec: DecodingSpec, guide: Guider | PreTrainedModel | None) -> Rule:
    if guide is not None:
        config = replace(config, guided=True)
    # A rule that brings its own sampling keeps it unless something else was asked for.
    sampling = None if config.sampling == Sampling() else config.sampling
    return resolve_unmask(config.rule(spec), sampling, guide)
