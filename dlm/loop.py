"""The loop that turns masks into text: ask the rule which slots it wants, the cache which ones to compute, run, commit.

Rule and cache policy know nothing of each other; what they share is the canvas. A step waits for the device once, when
the rows' progress is read. Rows of a batch go on at their own pace and get the tokens that they would get alone; a row
that is finished leaves the canvas, the cache and the rule, so that nothing is computed for it any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

from dlm.cache import Plan, Run
from dlm.canvas import Canvas
from dlm.config import DecodingConfig
from dlm.ends import StopStrings, end_rows
from dlm.nodes import Nodes
from dlm.shadows import Shadows
from dlm.stats import Decoded, Stats
from dlm.unmask import Unmasker
from dlm.unmask.base import Drafter

LogitsHook = Callable[[Canvas, torch.Tensor, torch.Tensor], torch.Tensor]


class StuckError(RuntimeError):
    """The rule commits nothing any more although masks are left."""


class Loop:
    """One generation: its parts, and what it has cost so far.

    Attributes:
        canvas: the rows that are not finished.
        ids: int64 [batch, L], all rows as they were when they left; `whole` has the others too.
        slots: int64 [batch, width], what is given back of them.
        unwanted: numbers of rows that nobody waits for any more: they leave unfinished before the next forward.
    """

    def __init__(
        self, model: Any, config: DecodingConfig, canvas: Canvas, unmasker: Unmasker, run: Run,
        stops: StopStrings | None = None, hook: LogitsHook | None = None,
    ) -> None:  # fmt: skip
        self.model, self.config, self.canvas, self.unmasker, self.run = model, config, canvas, unmasker, run
        self.stops, self.hook, self.stats = stops, hook, Stats()
        if unmasker.shadows and run.cache is None:
            raise ValueError("shadows need this package's attention function; load the model with load_model")
        if unmasker.shadows:
            run.cache.length += canvas.block_length  # they stand behind the canvas
        if config.eos != "none":
            canvas.ends = tuple(model.decoding_spec.eos_ids)
        self.ended = [canvas.length] * canvas.batch  # where each row ended
        self.ends = torch.tensor(model.decoding_spec.eos_ids, dtype=torch.int64, device=canvas.ids.device)
        self.committed = [0] * canvas.batch
        self.numbers = list(range(canvas.batch))  # of the canvas's rows among those that were given
        self.unwanted: set[int] = set()
        self.ids, self.given, self.tail, self.slots = canvas.ids, canvas.given, canvas.tail, canvas.answer_slots
        self.start = perf_counter()

    def steps(self, patience: int, expression: str) -> Iterator[None]:
        """Steps until no mask is left; gives control back after every forward, before rows leave.

        Args:
            patience: forwards in a row that may commit nothing.
            expression: of the rule, for the error.

        Raises:
            StuckError: the rule stopped committing tokens.
        """
        self.start, idle = perf_counter(), 0
        self.leave()
        while self.alive():
            left = sum(self.canvas.left_rows)
            committed = self.finish(self.step())
            if committed is not None:
                self.run.after(committed)
            idle = idle + 1 if sum(self.canvas.left_rows) == left else 0
            if idle > patience:
                raise StuckError(f"{idle} forwards committed nothing; the rule {expression} does not get on")
            yield
            self.leave()

    def finish(self, committed: torch.Tensor | None) -> torch.Tensor | None:
        """Ends rows whose text ends: `committed` bool [batch, L], and the slots that were filled; None if the cache
        does not ask."""
        # The cache must also learn of slots that an end of text filled: their keys and values are stale now.
        if self.canvas.ends:
            early = self.config.eos == "fill"
            ended = self.canvas.ended(early)
            # Seldom: a row ends once. What is behind its end is filled then, and stays.
            if any(now < self.canvas.length and now != before for now, before in zip(ended, self.ended, strict=True)):
                committed = _both(committed, end_rows(self.canvas, self.ends, early))
            self.ended = ended
        return committed if self.stops is None else _both(committed, self.stops.end_rows(self.canvas))

    def alive(self) -> list[int]:
        """Rows of the canvas that are neither finished nor unwanted."""
        unfinished = (row for row, block in enumerate(self.canvas.active_rows) if block < self.canvas.blocks)
        return [row for row in unfinished if self.numbers[row] not in self.unwanted]

    def leave(self) -> None:
        """Takes rows that are finished or unwanted out of everything that holds rows, unless all are."""
        alive = self.alive()
        if len(alive) in (0, self.canvas.batch):
            return
        self.ids, rows = self.whole(), torch.tensor(alive)
        self.ended, self.numbers = ([held[row] for row in alive] for held in (self.ended, self.numbers))
        # The canvas last: the others look at it to know how many rows there were.
        for part in (self.unmasker, self.run, self.canvas):
            part.take_rows(rows)

    def whole(self) -> torch.Tensor:
        """int64 [batch, L], every row that was given, finished or not."""
        return self.ids.index_copy(0, self.canvas.rows, self.canvas.ids)

    def answers(self) -> torch.Tensor:
        """int64 [batch, width], what is given back of every row."""
        return self.whole().gather(1, self.slots)

    def step(self) -> torch.Tensor | None:
        """One forward and what it commits: bool [batch, L], None if the cache does not ask."""
        canvas, run = self.canvas, self.run
        slots = self.unmasker.candidates(canvas, run.logit_window())
        forced = run.forced()
        if forced is not None:
            # The rule sees the forced slot alone, so that what it keeps count of agrees with what is committed.
            only = (forced[:, None] >= 0) & (slots != forced[:, None])
            slots = slots.masked_fill(only, -1)
        drafts = self.unmasker.drafts(canvas) if isinstance(self.unmasker, Drafter) else None
        # After `forced`, which asks what this plan is about to do: planning moves the policy on by one forward.
        plan = run.plan(slots)
        self.stats.row_forwards += canvas.batch
        if drafts is not None:
            choice = self._verify(Nodes(canvas, *drafts, self.unmasker.early, self.finish_nodes), slots, plan)
        else:
            logits = self._logits(slots, plan)
            if self.hook is not None:
                changed = self.hook(canvas, slots, logits)
                if getattr(changed, "shape", None) != logits.shape:
                    raise ValueError(
                        f"logits_hook gave {_what(changed)}; it must return the logits to use, of shape "
                        f"{list(logits.shape)}"
                    )
                logits = changed
            choice = self.unmasker.choose(logits, slots, canvas)
        where = choice.commit if forced is None else choice.commit | (slots == forced[:, None])
        before = canvas.left_rows
        committed = canvas.commit(slots, choice.tokens, where, told=self.run.follows)
        for row, then, now in zip(self.numbers, before, canvas.left_rows, strict=True):
            self.committed[row] += then - now
        return committed

    def finish_nodes(self, nodes: Canvas) -> None:
        """Ends rows of the canvases of a verification as those of the canvas itself."""
        if self.config.eos != "none" and len(self.ends):
            end_rows(nodes, self.ends, early=self.config.eos == "fill")
        if self.stops is not None:
            self.stops.end_rows(nodes)

    def _verify(self, nodes: Nodes, slots: torch.Tensor, plan: Plan) -> Any:
        """One forward of all nodes; the rule says how far they agree, and the cache keeps the last that does."""
        canvas, cache = nodes.canvas, self.run.cache
        wide = slots.repeat_interleave(nodes.count, 0)
        plan = nodes.plan(plan)
        logits = self._forward(canvas.ids, canvas.position_ids, wide - canvas.shift, plan)
        choice, accepted = self.unmasker.verify(logits.unflatten(0, (-1, nodes.count)), slots, nodes)
        if cache is not None:
            cache.settle(accepted)
        return choice

    def _logits(self, slots: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Logits [batch, r, V] of `slots`, guided by the prompt if asked for."""
        # Row j predicts slot j + shift, so the row that is read stands one before its slot in a Dream.
        canvas = self.canvas
        rows = slots - canvas.shift if canvas.shift else slots
        if self.unmasker.shadows:
            shadows = Shadows(canvas, plan)
            rows = shadows.rows(slots, canvas.ids.gather(1, slots.clamp(min=0)) != canvas.mask_id)
            return self._forward(shadows.ids, shadows.positions, rows, shadows.plan, shadows.visible)
        if not self.config.cfg_scale:
            return self._forward(canvas.ids, canvas.position_ids, rows, plan)
        # Both halves in one forward: the cache holds their rows side by side, and one plan serves both.
        ids = torch.cat([canvas.ids, canvas.ids.masked_fill(canvas.given, canvas.mask_id)])
        logits = self._forward(ids, canvas.position_ids.repeat(2, 1), rows.repeat(2, 1), plan.repeated(2))
        # Unsupervised guidance as in LLaDA (arXiv 2502.09992): (1 + w) log p(x | prompt) - w log p(x), on raw logits.
        given, alone = logits.chunk(2)
        return alone + (self.config.cfg_scale + 1) * (given - alone)

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, plan: Plan,
        visible: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Logits [batch, r, V] of the rows at slots `rows` int64 [batch, r] of ids [batch, L].

        What is seen is the plan's unless `visible` says it.
        """
        cache, stats = self.run.cache, self.stats
        if cache is not None:
            cache.plan = plan
        fed = plan.pick(ids)
        if visible is None:
            visible = plan.visible
            if cache is None:
                visible = None if visible is None else plan.pick(visible)
            elif self.canvas.grid is not None and plan.stop is None:
                visible = plan.causal(positions // self.canvas.grid)
        logits = self.model(
            fed, position_ids=plan.positions(positions), past_key_values=cache, attention_mask=visible,
            logits_rows=plan.rows(rows, ids.shape[1]),
        ).logits  # fmt: skip
        stats.forwards += 1
        # Afterwards: some caches know only now what they computed.
        stats.query_tokens += fed.numel() if plan.tokens is None else plan.tokens
        stats.value_tokens += plan.value_tokens
        stats.cache_bytes = 0 if cache is None else cache.kv_bytes()
        stats.cache_bytes_peak = max(stats.cache_bytes_peak, stats.cache_bytes)
        return logits.view(*rows.shape, -1)

    def report(self) -> Stats:
        """The statistics up to now."""
        rule, ids, given = dict(self.unmasker.stats), self.answers(), self.given.gather(1, self.slots)
        # True from a row's first end on: a running maximum needs no loop and no wait for the device.
        ended = (torch.isin(ids, self.ends) & (self.slots >= self.tail[:, None])).int().cummax(1).values.bool()
        return replace(
            self.stats, seconds=perf_counter() - self.start, committed=list(self.committed),
            text_tokens=(~ended & ~given & (ids != self.canvas.mask_id)).sum(1).tolist(),
            guider_forwards=rule.pop("guider_forwards", 0), extra=rule,
        )  # fmt: skip

    def decoded(self) -> Decoded:
        """What the generation gave so far; masks where nothing is written yet."""
        return Decoded(self.answers(), self.report())


def _what(given: Any) -> str:
    return f"a tensor of shape {list(given.shape)}" if isinstance(given, torch.Tensor) else repr(given)[:40]


def _both(committed: torch.Tensor | None, filled: torch.Tensor) -> torch.Tensor | None:
    return None if committed is None else committed | filled
