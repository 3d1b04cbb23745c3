"""SentenceKV: sentences of the prompt wait in host memory and come when the text is about them (arXiv 2504.00970).

At a prompt's end a scorer keeps `factor` times the budget of tokens, the pool; the rest is dropped. The pool moves to
the host, divided into sentences, and the mean key of each stays on the device. A decoded token sees the first and last
tokens and those sentences that are closest to the mean query of the sentence being written, up to the budget. A
sentence that has been written joins the pool.

Where paper and code differ, and where both cost more than they need: nothing is stored or chosen per query head (the
code repeats KV heads first), the pool really lies on the host (in the code it stays on the device and is masked), the
budget holds at every step (the code shows the whole pool behind each full stop), and sentences end where the text of a
token says so (the code looks thirteen strings up). The prompt's own unfinished sentence counts into the mean query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from textkv.context import Context
from textkv.eviction import PROTECTED, Eviction, keep_best
from textkv.evidence import Evidence, Needs
from textkv.layer import Layer
from textkv.method import register
from textkv.methods.snapkv import SnapKV
from textkv.retrieval import Retrieval
from textkv.retrievers.base import Retriever
from textkv.retrievers.sentences import Sentences
from textkv.segments.tiered import Plan, TieredSegment
from textkv.sentences import sentence_ends


@register("sentence_kv")
@dataclass(frozen=True)
class SentenceKV(Retrieval):
    """Wraps any scorer, which fills the pool; alone it wraps the paper's, snapkv(32, 7, "max").

    Attributes:
        factor: the pool's tokens per token of the budget; the paper's r, 2 to 3.
        first, recent: tokens that are always seen and count in the budget, 32 and 32 in the paper. The last sentences
            stay on the device as long as a token of them is recent.
        longest: most tokens of a sentence; longer ones are cut.
        batch: tokens that may wait on the device beyond recent ones and a whole sentence.
        tokenizer: folder or hub id of a tokenizer on this machine; "" = where the model was loaded from.
        ends: ids of the tokens that end a sentence, instead of a tokenizer.

    Raises:
        ValueError: factor < 1, a budget in tokens that `first` and `recent` take up, an inner method without scores.
    """

    first: int = 32
    recent: int = 32
    batch: int = 8
    factor: float = 3.0
    longest: int = 64
    tokenizer: str = ""
    ends: tuple[int, ...] = ()

    wraps: ClassVar = "scorer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor < 1:
            raise ValueError(f"factor={self.factor}: the pool cannot be smaller than the budget; use 1 or more")
        if self.longest < 1:
            raise ValueError(f"longest={self.longest}: a sentence needs at least 1 token")
        if self.inner is not None and not isinstance(self.inner, Eviction):
            raise ValueError(
                f"{self.inner.name}+{self.name}: {self.inner.name} scores a token only as it is dropped; use a scorer "
                "of prompts, e.g. snapkv"
            )

    @property
    def evicts(self) -> bool:
        """What does not fit in the pool."""
        return not self.budget.is_full

    @property
    def scorer(self) -> Eviction:
        """What fills the pool."""
        return self.inner or SnapKV(32, 7, "max", budget=self.budget)

    def needs(self) -> Needs:
        """The scorer's evidence, and token ids."""
        return self.scorer.needs() | Needs(ids=True)

    def on_build(self, context: Context) -> None:
        """Find out where sentences end.

        Raises:
            ValueError: there is no tokenizer to ask.
        """
        super().on_build(context)
        self.ends_of(context)

    def ends_of(self, context: Context) -> tuple[int, ...]:
        """Ids that end a sentence, by `ends` or by the tokenizer."""
        where = self.tokenizer or getattr(context.config, "_name_or_path", "")
        if self.ends:
            return self.ends
        if not where:
            raise ValueError(
                f"{self.name}: the model does not tell which tokens end a sentence; use "
                f"{self.name}(tokenizer='FOLDER') or {self.name}(ends=(ID, ...))"
            )
        try:
            return sentence_ends(where)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}; use {self.name}(tokenizer='FOLDER') or ends=(ID, ...)") from None

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """Fill the pool, then move it."""
        if not self.budget.is_full and layer.index >= self.dense:
            self._fill(layer, evidence)
        super().on_prefill_end(layer, evidence)
        held = layer.segments[0]
        if isinstance(held, TieredSegment):  # a later turn may have a larger budget
            held.host.retriever.longest = self._longest(held.plan)

    def retriever(self, layer: Layer, plan: Plan, evidence: Evidence) -> Retriever:
        """Sentences of the block, of which the pool holds some tokens."""
        sentences = Sentences(self.ends_of(layer.context), self._longest(plan))
        at = layer.held_positions()[:, 0] if evidence.norm_positions is None else evidence.norm_positions
        sentences.read(evidence.queries, at, evidence.ids, layer.kv_heads)
        return sentences

    def plan(self, tokens: torch.Tensor) -> Plan:
        """A whole sentence may wait beside the recent tokens."""
        plan = super().plan(tokens)
        plan.batch = plan.batch + self._longest(plan)
        return plan

    def _longest(self, plan: Plan) -> torch.Tensor:
        return (plan.seen // 4).clamp(min=1, max=self.longest)

    def _fill(self, layer: Layer, evidence: Evidence) -> None:
        plan = self.plan(evidence.remaining)
        self.scorer.learn(layer, evidence)
        wanted = (plan.seen * self.factor).ceil().long()
        room = torch.minimum(wanted, evidence.remaining).tolist()
        if bool((layer.lengths().amax(1) <= torch.tensor(room)).all()):
            return
        scores, at = self.scorer.scores(layer, evidence, keep=room), layer.held_positions()
        # What every token will see is in the pool of every head, so that the heads share these tokens.
        newest = at.flatten(1).amax(1)[:, None, None]
        first, late = (x.to(at.device)[:, None, None] for x in (plan.first, plan.recent + self._longest(plan)))
        always = (at >= 0) & ((at < first) | (at > newest - late))
        keep_best(layer, scores.masked_fill(always, PROTECTED), torch.tensor(room)[:, None])
