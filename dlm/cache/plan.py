"""The plan of one forward: which slots of the canvas are its queries, and where their logits stand in its output.

Cache policies make plans, the loop and the stored slots read them; nothing of either is known here.
"""

from __future__ import annotations

import torch

from dlm.canvas import Canvas


class Plan:
    """The queries of one forward.

    Attributes:
        queries: slots computed anew: a slice if all rows share it, else int64 [batch, q], ascending, -1 = filler.
        visible: bool [batch, n], slots that may be attended; None = all.
        tokens: queries of unfinished rows, padding and filler left out: what the rows would cost if run alone.
        value_tokens: rows whose values are projected besides (only dLLM-Cache).
    """

    def __init__(
        self, queries: slice | torch.Tensor, visible: torch.Tensor | None, tokens: int, value_tokens: int = 0
    ) -> None:
        self.queries, self.visible, self.tokens, self.value_tokens = queries, visible, tokens, value_tokens
        self._slots: torch.Tensor | None = None
        if not isinstance(queries, slice):
            # A filler repeats its row's last query: it computes and writes the same values once more, so nothing
            # has to be masked. A row without queries is finished; its last slot may be rewritten freely.
            self._slots = torch.where(queries < 0, queries.amax(1, keepdim=True), queries).clamp(min=0)

    @property
    def slots(self) -> torch.Tensor | None:
        """int64 [batch, q], `queries` with each filler replaced by a query of its row; None for a slice."""
        return self._slots

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """The queries' entries of x [batch, L]: [batch, q]."""
        return x[:, self.queries] if self._slots is None else x.gather(1, self._slots)

    def rows(self, slots: torch.Tensor) -> torch.Tensor:
        """Where slots int64 [batch, r] stand among the queries; any index for a slot that is negative."""
        if self._slots is None:
            return (slots - self.queries.start).clamp(min=0)
        # Queries ascend and fillers repeat the largest, so the row is sorted and the first match is a true query.
        found = torch.searchsorted(self._slots, slots.contiguous())
        return found.clamp(max=self._slots.shape[1] - 1)

    def doubled(self) -> Plan:
        """The same plan for a batch in which every row stands twice (classifier-free guidance)."""
        queries = self.queries if self._slots is None else self.queries.repeat(2, 1)
        visible = None if self.visible is None else self.visible.repeat(2, 1)
        return Plan(queries, visible, 2 * self.tokens, 2 * self.value_tokens)


def window_plan(canvas: Canvas, low: torch.Tensor, high: torch.Tensor) -> Plan:
    """A plan of one contiguous window [low, high) per row; int64 [batch] on the CPU. Finished rows may be ignored."""
    alive = canvas.unfinished
    real = canvas.real_start_cpu
    first = torch.maximum(low, real)
    tokens = int((high - first)[alive].sum())
    # The common case, all rows in the same block: a slice costs neither an index tensor nor a gather.
    if bool((low == low[alive][0])[alive].all() & (high == high[alive][0])[alive].all()):
        # Padding inside a shared window is computed and never seen.
        start = max(int(low[alive][0]), int(real.min()))
        return Plan(slice(start, int(high[alive][0])), canvas.valid, tokens)
    # A finished row gets the window [L - 1, L): one query that nobody reads, the least that a batch allows.
    first, high = first.masked_fill(~alive, canvas.length - 1), high.masked_fill(~alive, canvas.length)
    queries = first[:, None] + torch.arange(int((high - first).max()))
    queries = queries.masked_fill(queries >= high[:, None], -1)
    return Plan(queries.to(canvas.ids.device), canvas.valid, tokens)


def index_plan(canvas: Canvas, queries: torch.Tensor) -> Plan:
    """A plan of any slots, bool [batch, L]; padding and finished rows are left out."""
    alive = canvas.unfinished.to(queries.device)
    queries = queries & alive[:, None]
    if canvas.valid is not None:
        queries = queries & canvas.valid
    counts = queries.sum(1).cpu()
    # A stable sort of the negated flags puts each row's queries first and leaves them ascending, as `rows` needs.
    order = (~queries).int().sort(dim=1, stable=True).indices[:, : int(counts.max())]
    return Plan(order.masked_fill(~queries.gather(1, order), -1), canvas.valid, int(counts.sum()))
