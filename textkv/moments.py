"""When a method acts on a layer: after a prompt block, after a decoded token, or when what was held back is final."""

from __future__ import annotations

from dataclasses import replace

import torch

from textkv.call import Tokens
from textkv.contents import Contents
from textkv.evidence import Evidence
from textkv.segments.base import Step
from textkv.softmax import Softmax

SPARE = 128
"""Queries kept beyond a method's window while drafts may be taken back: more than any draft is long."""


class Moments(Contents):
    """The part of a layer that calls the method's hooks; see `textkv.layer.Layer` for its attributes."""

    softmax: Softmax
    hidden: torch.Tensor | None
    last_share: torch.Tensor | None
    last_row: torch.Tensor | None
    _due: list[tuple[bool, torch.Tensor | None]]

    def _end(
        self,
        step: Step,
        tokens: Tokens,
        prompt: bool,
        hidden: torch.Tensor | None,
        lse: torch.Tensor | None,
        final: bool = False,
    ) -> None:
        """The tokens are in and every layer that reads them has: count them, and let the method act; `final`: although
        drafts follow in the same forward."""
        m = step.k.shape[2]
        self.seen += m
        self.real_seen, self.hidden = tokens.seen, step.hidden
        self.since_eviction += m
        context = self.context
        context.came = tokens.came
        ends, hold = prompt and self.seen >= context.block_end, context.hold and not final
        if self.kind.governed and not context.frozen:
            # Evidence is of the block's own queries, so it is taken while they are here, chunk by chunk.
            if prompt:
                self._collect(step, hidden, lse)
                context.note_bytes(self)
            if hold:
                # The queries may be those of drafts: the method acts when it is known which tokens stay.
                self._due.append((ends, None if prompt else step.q))
            elif ends:
                ends = self._prompt_end(step.q, told=context.block_end > self.seen - m)
            elif not prompt:
                self._decode_end(step.q)
        if not hold:
            self._let_go()
        self.last_share = self.last_row = self.hidden = None
        context.after_step(self, ends and not hold and not context.frozen, None if final else tokens)

    def _collect(self, step: Step, hidden: torch.Tensor | None, lse: torch.Tensor | None) -> None:
        context = self.context
        if context.needs.hidden and hidden is None:
            raise RuntimeError(
                "the method needs hidden states but none arrived: build the cache as MethodCache(model, ...) with "
                "the same model that runs"
            )
        # Drafts that go take the window's last queries with them: older ones then move up.
        spare = SPARE if context.hold else 0
        self.collector.take(
            step, self.stored, hidden=hidden, spans=context.spans, rotary=self.rotary, lse=lse, spare=spare
        )

    def _prompt_end(self, q: torch.Tensor, told: bool) -> bool:
        """The method acts at the end of a prompt block; `told`: one that was announced. Returns whether it was one.

        Whatever comes to its neighbours, a row's single token is what it is alone: a decoded one, unless it was told to
        be a prompt.
        """
        context = self.context
        evidence = self.collector.finish(q, self.softmax, self.real_seen, context.spans, context.gone, context.grids)
        if self.hidden is not None and context.needs.window:
            evidence = replace(evidence, hidden=self.hidden)
        single = None if told else evidence.single
        if single is not None:
            evidence = evidence.without(single)
        context.came = evidence.came
        block = single is None or bool((evidence.came > 0).any())
        if block:
            with context.timed("on_prefill_end"):
                context.method.on_prefill_end(self, evidence)
        if single is not None:
            context.came = single.long()
            self._decode_end(q[:, :, -1:])
            context.came = evidence.came  # for `on_finish`
        return block

    def _decode_end(self, q: torch.Tensor) -> None:
        with self.context.timed("on_decode_end"):
            self.context.method.on_decode_end(self, q)

    def commit(self) -> bool:
        """What was held back is final (see `Context.hold`): let the method act now. Returns whether a block ended."""
        due, self._due = self._due, []
        for ends, query in due:
            self.context.came = None
            if ends:
                self._prompt_end(self.real_seen.new_zeros(1, 1, 0, 1, dtype=self.dtype).to(self.device), told=True)
            elif query is not None:
                self._decode_end(query[:, :, -1:])
        self._let_go()
        return any(ends for ends, _ in due)

    def forget_due(self, but: int) -> None:
        """Drops what waits for `commit`, but for the first so many: a forward that did not come to its end."""
        self._due = self._due[:but]

    def _let_go(self) -> None:
        """The method has acted: nothing of the model's stays here, and nothing that no later token can see. An earlier
        one could: what came cannot be taken back any more."""
        self.softmax = self.softmax._replace(sinks=None)
        if self.context.frozen:
            return
        if any([segment.settle() for segment in self.segments]):
            self.since_eviction = 0

    def absorb(
        self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, observers: torch.Tensor, scale: float,
        observed: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Takes in tokens that another store held until now; the method acts as at the end of a prompt block.

        Args:
            k, v: [batch, kv_heads, m, head_dim], keys post-RoPE.
            positions: int32 [batch, m] logical positions, -1 = padding.
            observers: [batch, heads, w, head_dim] post-RoPE queries that the method may take for the block's last.
            observed: int64 [batch] on the CPU, how many of them, the last ones, are each row's; None = all.
        """
        if not self.is_initialized:
            self.lazy_initialization(k)
        real = positions >= 0
        step = Step(observers[:, :, :0], k, v, positions, scale, padded=not bool(real.all()))
        # A method takes the last of these for the queries that follow the block.
        window = min(self.context.needs.window, observers.shape[2])
        came = real.sum(1).cpu()
        asked = (torch.full((len(k),), window) if observed is None else observed).clamp(max=window)
        queries = observers[:, :, observers.shape[2] - int(asked.max()) :]
        evidence = Evidence(queries, scale, self.real_seen + came, came=came if step.padded else None, asked=asked)
        self.replay(step, evidence)

    def replay(self, step: Step, evidence: Evidence) -> None:
        """Takes in a prompt block whose attention was computed elsewhere; the method acts as at its end.

        Args:
            step: the block's tokens; its queries [batch, heads, 0, head_dim] are none.
            evidence: what was gathered there, as far as the method asks for it; `tokens` counts the block.
        """
        if not self.is_initialized:
            self.lazy_initialization(step.k)
        self.context.stay_writable()
        self.segments[-1].append(step)
        self.softmax = evidence.softmax
        self.seen += step.k.shape[2]
        self.since_eviction += step.k.shape[2]
        self.real_seen = evidence.tokens
        self.context.note_bytes(self)
        self.context.came = evidence.came
        with self.context.timed("on_prefill_end"):
            self.context.method.on_prefill_end(self, evidence)
        self.softmax = self.softmax._replace(sinks=None)
        self.context.after_step(self, True, None)
