"""Elastic-Cache (arXiv 2510.14973): layers are computed anew from where attention has drifted, and only then.

Every layer keeps the input, queries, keys and values of all slots. A forward computes the first masks of the answer
(the window), what the last forward wrote, and of every layer the written slots that the window looks at most. Where the
attention row of these has turned away from its old self, by cosine below `gamma`, the layers above compute every slot;
below it the others keep what they had. So nothing is scheduled: a forward costs what it finds to have changed.

The authors' code measures the cosine along the heads of each key; the text of the paper means the row over the keys,
which is done here. Slots that are not computed keep stale values at any `gamma`, so the result is never exact, but for
`refresh=1`, which is no cache at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from dlm.cache.base import Policy, Run, check_interval, register
from dlm.cache.plan import Packing, Plan
from dlm.cache.slots import SlotCache, SlotLayer, by_rows
from dlm.canvas import Canvas
from dlm.models.attention import full_attention
from dlm.models.decoding_spec import DecodingSpec


@register("elastic")
@dataclass(frozen=True)
class ElasticCache(Policy):
    """Query tokens of a forward without drift: window + slots just written + slots that are watched.

    Attributes:
        window: masks that a forward computes, and may write.
        gamma: cosine below which the layers above are computed anew; above 1 = always, -1 = never.
        track: slots that each layer watches.
        refresh: compute everything at every such forward; None = only at the first.

    Raises:
        ValueError: a window or a number of watched slots below 1, refresh below 1, gamma that is no number.
    """

    window: int = 16
    gamma: float = 0.9
    track: int = 1
    refresh: int | None = None

    prunes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("window", "track"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is no number of slots; use 1 or more")
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, int | float):
            raise ValueError(f"gamma={self.gamma!r} is no cosine; use -1 to 1, the authors' is 0.9")
        check_interval("refresh", self.refresh)

    @property
    def whole_blocks(self) -> bool:
        """No: what was written is computed once more and then read."""
        return False

    def check(self, spec: DecodingSpec) -> None:
        """Raises ValueError for a block-causal model."""
        if spec.block is not None:
            raise ValueError("cache elastic looks at whole rows; a block-causal model has cache block")

    def begin(self, canvas: Canvas, model: Any) -> Run:
        """A run that has computed nothing."""
        return _Run(canvas, self, model)


class _Run(Run):
    per_row = ("recent",)

    def __init__(self, canvas: Canvas, policy: ElasticCache, model: Any) -> None:
        super().__init__(canvas, DriftCache(canvas, policy, model.config.num_hidden_layers))
        self.policy = policy
        self.recent = torch.zeros_like(canvas.given)

    def _window(self) -> torch.Tensor:
        """bool [batch, L], each row's first masks."""
        masked = self.canvas.masked() & ~self.canvas.given
        return masked & (masked.cumsum(1) <= self.policy.window)

    def logit_window(self) -> tuple[torch.Tensor, torch.Tensor]:
        """From the first mask to the last of the window."""
        window = self._window()
        slots = torch.arange(self.canvas.length, device=window.device)
        return window.int().argmax(1), (window * (slots + 1)).amax(1)

    def plan(self, wanted: torch.Tensor) -> Plan:
        """Tells the cache what must be computed; all rows go in, and the layers say what is computed besides."""
        every = self.policy.refresh
        self.cache.whole = self.forwards == 0 or (every is not None and self.forwards % every == 0)
        self.forwards += 1
        window = self._window()
        queries = window | self.recent
        if self.canvas.shift:
            # Row j predicts slot j + 1. A clone: both sides overlap.
            queries[:, :-1] |= queries[:, 1:].clone()
        self.cache.look(window, queries)
        return Plan(slice(0, self.canvas.length), self.canvas.valid)

    def after(self, committed: torch.Tensor) -> None:
        """Keeps what was written: it is computed once more as text."""
        self.recent = committed


class DriftLayer(SlotLayer):
    """One layer: input x [batch, L, width], q [batch, heads, L, d], k and v [batch, kv_heads, L, d] of all slots.

    Attributes:
        watched: int64 [batch, n], the slots whose attention tells of drift, -1 = none; None before the first forward.
    """

    def __init__(self, cache: DriftCache) -> None:
        super().__init__(cache)
        self.x: torch.Tensor | None = None
        self.q: torch.Tensor | None = None
        self.watched: torch.Tensor | None = None

    def drive(
        self, layer: Any, hidden: torch.Tensor, fresh: Packing | None, rows: Packing | None, rope: tuple,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """The model's layer over hidden [batch, L, width], of which `fresh` are new; only `rows` are computed. None =
        all.

        Returns its output, in which only those rows have a meaning, and the cosine [batch] between the attention of the
        watched slots before and now (None = there was nothing to compare).
        """
        self.x = hidden if fresh is None or self.x is None else fresh.put(self.x, fresh.take(hidden))
        part = self.x if rows is None else rows.take(self.x)
        if rows is not None:
            rope = tuple(rows.take(table.flatten(0, -3).expand(len(hidden), -1, -1)).unsqueeze(1) for table in rope)
        normed = layer.input_norm(part)
        query, key = layer.qk(normed, rope)
        before = None if self.watched is None else self._attention(self.watched, layer.scaling, mask)
        self._put(rows, len(hidden), q=query, k=key, v=layer.v(normed))
        cosine = None if before is None else self._cosine(before, layer.scaling, mask)
        branch = by_rows(rows, query, lambda q: full_attention(q, self.k, self.v, layer.scaling, mask))
        part = part + layer.to_out(branch.transpose(1, 2).flatten(2))
        part = part + layer.ffn(part)
        return part if rows is None else rows.put(self.x, part), cosine

    def watch(self, slots: torch.Tensor, text: torch.Tensor, count: int, scale: float) -> None:
        """Chooses the slots of the next forward: those of `text` bool [batch, L] that the window's rows attend most.

        The window's are slots int64 [batch, n], -1 = none.
        """
        mass = self._attention(slots, scale, None) * (slots >= 0)[:, None, :, None]
        best = mass.sum((1, 2)).masked_fill(~text, -1).topk(min(count, text.shape[1]), 1)
        self.watched = best.indices.masked_fill(best.values < 0, -1)

    def _attention(self, slots: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
        """fp32 [batch, heads, n, L], what the queries of slots int64 [batch, n] attend of what is stored."""
        index = slots.clamp(min=0)[:, None, :, None].expand(-1, self.q.shape[1], -1, self.q.shape[3])
        queries = self.q.gather(2, index).float()
        keys = self.k.repeat_interleave(self.q.shape[1] // self.k.shape[1], 1).float()
        scores = queries @ keys.mT * scale
        visible = self.cache.canvas.valid if mask is None else mask.bool()
        if visible is not None:
            visible = visible.repeat(len(scores) // len(visible), 1)
            scores = scores.masked_fill(~visible[:, None, None], torch.finfo(scores.dtype).min)
        return scores.softmax(-1)

    def _cosine(self, before: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
        """[batch], mean over heads and watched slots; 1 where none is watched."""
        cosine = F.cosine_similarity(before, self._attention(self.watched, scale, mask), dim=-1).mean(1)
        there = self.watched >= 0
        return torch.where(there.any(1), (cosine * there).sum(1) / there.sum(1).clamp(min=1), 1.0)

    def _put(self, rows: Packing | None, batch: int, **new: torch.Tensor) -> None:
        for name, x in new.items():
            if rows is None:
                setattr(self, name, x)
                continue
            if getattr(self, name) is None:
                # The first forward of a padded batch: what is padding stays zero and is never seen.
                setattr(self, name, x.new_zeros(batch, x.shape[1], self.cache.length, x.shape[3]))
            rows.store(getattr(self, name), x)

    def tensors(self) -> list[torch.Tensor]:
        """Keys, values, queries and inputs."""
        return [x for x in (self.k, self.v, self.q, self.x) if x is not None]

    def take_rows(self, rows: torch.Tensor) -> None:
        """Keeps rows int64 [kept] of the batch."""
        super().take_rows(rows)
        self.q, self.x, self.watched = self.q[rows], self.x[rows], self.watched[rows]


class DriftCache(SlotCache):
    """What runs the model's layers on the rows that must be computed.

    Attributes:
        whole: whether everything is computed in this forward.
        window: int64 [batch, n], slots of the masks that are looked from, -1 = none.
        queries: bool [batch, L], what must be computed.
        text: bool [batch, L], slots that hold a token.
        computed: rows of single layers that were computed and not counted yet.
    """

    drives_layers = True
    layer_class = DriftLayer

    def __init__(self, canvas: Canvas, policy: ElasticCache, depth: int) -> None:
        super().__init__(canvas.length)
        self.canvas, self.policy, self.depth = canvas, policy, depth
        self.whole, self.computed = True, 0
        self.rows: Packing | None = None
        self.fresh: Packing | None = None
        self.look(canvas.masked(), canvas.masked())
        self.wanted: torch.Tensor | None = None

    def look(self, window: torch.Tensor, queries: torch.Tensor) -> None:
        """What the next forward looks from and must compute: bool [batch, L] each."""
        slots = window.int().sort(dim=1, descending=True, stable=True).indices[:, : self.policy.window]
        self.window, self.queries = slots.masked_fill(~window.gather(1, slots), -1), queries
        masked, valid = self.canvas.masked(), self.canvas.valid
        self.text = ~masked if valid is None else ~masked & valid

    def drive(self, layer: Any, hidden: torch.Tensor, rope: tuple, mask: torch.Tensor | None) -> torch.Tensor:
        """The model's `layer` over hidden states [batch, L, width]; called by the layer's own forward."""
        times = len(hidden) // self.canvas.batch
        if layer.layer_idx == 0:
            self._begin(times, hidden.device)
        store = self.layer(layer.layer_idx)
        out, cosine = store.drive(layer, hidden, self.fresh, self.rows, rope, mask)
        self.fresh = self.rows
        self.computed += out.shape[0] * out.shape[1] if self.rows is None else len(self.rows)
        store.watch(self.window.repeat(times, 1), self.text.repeat(times, 1), self.policy.track, layer.scaling)
        last = layer.layer_idx == self.depth - 1
        # Asked only where the answer counts, because the device has to be waited for: how many rows the next layer has.
        if not (self.whole or last or self.rows is None or cosine is None):
            drifted = cosine < self.policy.gamma
            if bool(drifted.any()):
                # Each row on its own: from the next layer on it computes all its slots.
                self._want(self.wanted | drifted[:, None])
        if last:
            # What is less than a token through all layers is counted with the next forward.
            self.plan.tokens, self.computed = divmod(self.computed, self.depth)
        return out

    def _begin(self, times: int, device: torch.device) -> None:
        """The rows of the first layer: what must be computed, and what any layer watches."""
        self.fresh = None
        wanted = torch.ones_like(self.queries) if self.whole else self.queries.clone()
        wanted = wanted.repeat(times, 1)
        if not self.whole:
            watched = torch.cat([store.watched for store in self.layers], 1)
            # An entry that is none points at slot 0 without meaning it.
            wanted |= torch.zeros_like(wanted, dtype=torch.int64).scatter_add_(
                1, watched.clamp(min=0), (watched >= 0).long()
            ).bool()  # fmt: skip
        self._want(wanted)

    def _want(self, wanted: torch.Tensor) -> None:
        valid = self.canvas.valid
        self.wanted = wanted if valid is None else wanted & valid.repeat(len(wanted) // len(valid), 1)
        self.rows = None if valid is None and bool(self.wanted.all()) else Packing.of(self.wanted)
