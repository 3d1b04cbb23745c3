"""What a method may look at when a prompt block ends, and how it asks for it; `textkv.collector` gathers it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch

from textkv.query_statistics import QueryCentres, QueryMoments
from textkv.screens import Grids, ScreenStates, Spans
from textkv.segments.base import shown
from textkv.softmax import Softmax


@dataclass(frozen=True)
class Needs:
    """Evidence to gather while the prompt runs. Nothing is gathered that no method asked for.

    Attributes:
        window: how many of the prompt's last post-RoPE queries to keep until the prompt ends.
        hidden: "attn_input" (after the input norm) or "residual" (before it): row norms of that hidden state.
        rope: how each layer's keys turn (`Layer.rotary`), proven on the model, and the position ids of each token.
        spans: the token spans of the prompt's screenshots, given by `MethodCache.begin`.
        grids: and the grid in which each one's tokens lie.
        states: the hidden states themselves of the tokens in screenshots, of the kind that `hidden` names.
        columns: the attention that every stored token gets from ALL queries of the prompt block. Costs as much
            arithmetic as the block's attention, but never holds an n x n matrix.
        query_moments: mean and covariance of the block's queries as they were before the rotary embedding, leaving out
            each row's first `query_moments` tokens; None = not asked for. Needs `rope` to turn the queries back.
        query_centres: mean of the block's pre-RoPE queries and mean length of each of their rotary pairs. Needs `rope`.
        query_peaks: the largest magnitude of each channel of the block's post-RoPE queries.
        positions: the position table: where each token's keys were turned to, for as long as the cache lives.
        query_sample: keep the post-RoPE queries of every so many-th position of the block until the prompt ends; 0 =
            none.
        ids: token ids, of a prompt block as evidence and of every forward in its `Step`.

    Raises:
        ValueError: a negative query_sample, query_moments or query_centres without rope, negative query_moments, or
            states without hidden.
    """

    window: int = 0
    hidden: Literal["attn_input", "residual"] | None = None
    rope: bool = False
    spans: bool = False
    columns: bool = False
    query_moments: int | None = None
    query_centres: bool = False
    query_peaks: bool = False
    positions: bool = False
    query_sample: int = 0
    ids: bool = False
    grids: bool = False
    states: bool = False

    def __post_init__(self) -> None:
        if self.query_sample < 0:
            raise ValueError(f"query_sample={self.query_sample}: give every how many-th query to keep, or 0 for none")
        if self.query_moments is not None and (self.query_moments < 0 or not self.rope):
            raise ValueError(
                f"query_moments={self.query_moments} with rope={self.rope}: give the number of first tokens to leave "
                "out (0 = none) and rope=True, without which queries cannot be turned back"
            )
        if self.states and not (self.hidden and self.spans):
            raise ValueError('states without hidden and spans: give hidden="attn_input" or "residual", and spans=True')
        if self.query_centres and not self.rope:
            raise ValueError(
                "query_centres with rope=False: give rope=True, without which queries cannot be turned back"
            )

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            window=max(self.window, other.window),
            # One pass can note one kind of hidden state; two methods that want different ones are refused by their
            # composition.
            hidden=self.hidden or other.hidden,
            rope=self.rope or other.rope,
            spans=self.spans or other.spans,
            columns=self.columns or other.columns,
            query_moments=max((x.query_moments for x in (self, other) if x.query_moments is not None), default=None),
            query_centres=self.query_centres or other.query_centres,
            query_peaks=self.query_peaks or other.query_peaks,
            positions=self.positions or other.positions,
            # A sample serves another only where both count in the same steps; methods that differ have their own cache.
            query_sample=self.query_sample or other.query_sample,
            ids=self.ids or other.ids,
            grids=self.grids or other.grids,
            states=self.states or other.states,
        )


@dataclass(frozen=True)
class Evidence:
    """Evidence of one prompt block in one layer.

    Attributes:
        queries: [batch, heads, w, head_dim] post-RoPE queries of the block's last w tokens (w = 0 if not asked for).
        scale: the softmax scale.
        tokens: int64 [batch] on the CPU: real tokens seen per row, this block included.
        norms: fp32 [batch, m] row norms of the hidden state for the block's m tokens, or None.
        norm_positions: int32 [batch, m] logical positions of these tokens (-1 = padding), or None.
        rope_positions: [batch, m] rotary positions of these tokens (temporal axis under M-RoPE), or None.
        spans: screenshots seen so far, per row.
        columns: fp32 [batch, kv_heads, n], n slots of `layer.stored()`: attention summed over all queries of the block,
            mean over each KV head's query heads, or None.
        moments: of the block's pre-RoPE queries, or None.
        came: int64 [batch] on the CPU, real tokens of each row in the block; None = all rows got as many, no padding.
        asked: int64 [batch] on the CPU, how many of the last `queries` are a row's; None = those of the block's tokens.
        softcap, sinks: of the model's scores, or None; see `Softmax`.
        peaks: fp32 [batch, heads, head_dim], largest magnitude of the block's post-RoPE queries per channel, or None.
        centres: of the block's pre-RoPE queries, or None.
        statistic: fp32 [batch, kv_heads, n], a token statistic of the method's own (see `Layer.statistic`), or None.
        head: the KV head that this is evidence of, for a method that knows its heads by number; None = all.
        sampled: [batch, heads, s, head_dim] post-RoPE queries of the block's sampled positions, or None.
        sampled_positions: int32 [batch, s], theirs, -1 where a row has no token in this column, or None.
        ids: int64 [batch, m], the block's token ids, or None; their positions are `norm_positions`.
        gone: int64 [batch] on the CPU, how many of `tokens` were forgotten on demand; None = none.
        grids: those of `spans`; empty = not told.
        states: of the block's tokens in screenshots, or None.
        hidden: bool [batch, p], logical positions that the call's mask hid from `queries`; None = none.
    """

    queries: torch.Tensor
    scale: float
    tokens: torch.Tensor
    norms: torch.Tensor | None = None
    norm_positions: torch.Tensor | None = None
    rope_positions: torch.Tensor | None = None
    spans: Spans = field(default_factory=list)
    columns: torch.Tensor | None = None
    moments: QueryMoments | None = None
    peaks: torch.Tensor | None = None
    came: torch.Tensor | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    centres: QueryCentres | None = None
    statistic: torch.Tensor | None = None
    head: int | None = None
    sampled: torch.Tensor | None = None
    sampled_positions: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    gone: torch.Tensor | None = None
    grids: Grids = field(default_factory=list)
    states: ScreenStates | None = None
    asked: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    @property
    def softmax(self) -> Softmax:
        """How the model weighs these queries' products with keys."""
        return Softmax(self.scale, self.softcap, self.sinks)

    @property
    def remaining(self) -> torch.Tensor:
        """Tokens of each row that the conversation still has, int64 [batch]: what a budget is a share of.

        Not what a layer has stored: a token that the method dropped is still one of the conversation's.
        """
        return self.tokens if self.gone is None else self.tokens - self.gone

    def part(self, row: int, head: int | None, kv_heads: int, slots: torch.Tensor) -> Evidence:
        """The evidence of one row, and of one KV head's query heads if `head` is given; `slots` int64 [k] are the
        row's stored tokens."""
        one, which, ours = slice(row, row + 1), slice(None), slice(None)
        if head is not None:
            group = self.queries.shape[1] // kv_heads
            which, ours = slice(head, head + 1), slice(head * group, (head + 1) * group)
        return Evidence(
            queries=self.queries_of(row)[:, ours],
            **self.softmax.of_heads(ours).options,
            tokens=self.tokens[one],
            gone=None if self.gone is None else self.gone[one],
            norms=None if self.norms is None else self.norms[one],
            norm_positions=None if self.norm_positions is None else self.norm_positions[one],
            rope_positions=None if self.rope_positions is None else self.rope_positions[one],
            spans=self.spans[one] if self.spans else [],
            columns=None if self.columns is None else self.columns[one, which][:, :, slots],
            moments=None if self.moments is None else self.moments.part(one, ours),
            peaks=None if self.peaks is None else self.peaks[one, ours],
            centres=None if self.centres is None else self.centres.part(one, ours),
            statistic=None if self.statistic is None else self.statistic[one, which][:, :, slots],
            head=head,
            sampled=None if self.sampled is None else self.sampled[one, ours],
            sampled_positions=None if self.sampled_positions is None else self.sampled_positions[one],
            ids=None if self.ids is None else self.ids[one],
            grids=self.grids[one] if self.grids else [],
            states=None if self.states is None else self.states.row(row),
            hidden=None if self.hidden is None else self.hidden[one],
        )

    def only(self, needs: Needs) -> Evidence:
        """What a method with these needs would have been given of it, and no more: some go by what there is."""
        width = min(needs.window, self.queries.shape[2])
        placed = needs.hidden or needs.rope or needs.ids
        return replace(
            self,
            queries=self.queries[:, :, self.queries.shape[2] - width :],
            norms=self.norms if needs.hidden else None,
            norm_positions=self.norm_positions if placed else None,
            rope_positions=self.rope_positions if needs.rope else None,
            columns=self.columns if needs.columns else None,
            moments=None if needs.query_moments is None else self.moments,
            centres=self.centres if needs.query_centres else None,
            peaks=self.peaks if needs.query_peaks else None,
            sampled=self.sampled if needs.query_sample else None,
            sampled_positions=self.sampled_positions if needs.query_sample else None,
            ids=self.ids if needs.ids else None,
            states=self.states if needs.states else None,
            hidden=self.hidden if width else None,
        )

    def visible(self, positions: torch.Tensor) -> torch.Tensor:
        """Which stored tokens `queries` may see, or are their own: bool like positions int32 [batch, heads, n]."""
        if self.hidden is None:
            return positions >= 0
        first = (self.tokens - self.own_queries()).clamp(min=0).to(positions.device)
        return shown(positions, self.hidden) | (positions >= first.view(-1, 1, 1))

    def queries_of(self, row: int) -> torch.Tensor:
        """The window's queries of one row, [1, heads, w, head_dim]: fewer where its block was shorter."""
        width = self.queries.shape[2]
        return self.queries[row : row + 1, :, width - int(self.own_queries()[row]) :]

    def own_queries(self) -> torch.Tensor:
        """How many of the window's queries, the last ones, are each row's own: int64 [batch] on the CPU."""
        width, own = self.queries.shape[2], self.came if self.asked is None else self.asked
        return torch.full_like(self.tokens, width) if own is None else own.clamp(max=width)

    @property
    def idle(self) -> torch.Tensor | None:
        """Rows to which the block brought nothing but padding, bool [batch] on the CPU; None = there are none."""
        return None if self.came is None or bool((self.came > 0).all()) else self.came == 0

    @property
    def single(self) -> torch.Tensor | None:
        """Rows to which the block brought one token behind others, bool [batch] on the CPU; None = there are none."""
        if self.came is None:
            return None
        rows = (self.came == 1) & (self.tokens > 1)
        return rows if bool(rows.any()) else None

    def without(self, rows: torch.Tensor) -> Evidence:
        """The evidence as if the block had brought nothing but padding to `rows`, bool [batch] on the CPU."""
        gone = rows.to(self.queries.device)

        def wiped(x: torch.Tensor | None, value: float = 0) -> torch.Tensor | None:
            return None if x is None else x.masked_fill(gone.view(-1, *[1] * (x.dim() - 1)), value)

        def emptied(x: Any) -> Any:
            return x and replace(x, **{part.name: wiped(getattr(x, part.name)) for part in fields(x)})

        return replace(
            self,
            came=self.came.masked_fill(rows, 0),
            norm_positions=wiped(self.norm_positions, -1),
            columns=wiped(self.columns),
            moments=emptied(self.moments),
            centres=emptied(self.centres),
            peaks=wiped(self.peaks),
            sampled_positions=wiped(self.sampled_positions, -1),
            states=self.states and replace(self.states, positions=wiped(self.states.positions, -1)),
        )
