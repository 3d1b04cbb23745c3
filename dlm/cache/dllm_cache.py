"""dLLM-Cache (arXiv 2506.06295): whole layer outputs are kept, and only rows whose values drifted are computed anew.

Every layer but the first keeps K, V, the attention branch A and the feed-forward branch F of all slots. Prompt and
response refresh at their own intervals; a row's response begins at its first mask. In between, the values of all
response rows are computed (cheap) and compared with the kept ones; the share `ratio` that changed most gets new keys,
attention and feed-forward, the others reuse A and F. Beside K and V that is 2 * width numbers more per slot and layer.

The authors keep this state in one object per process and fix Dream's width; here it belongs to one generation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from dlm.cache.base import Policy, Run, check_interval, register
from dlm.cache.plan import Packing, Plan
from dlm.cache.slots import SlotCache, SlotLayer, by_rows
from dlm.canvas import Canvas
from dlm.models.attention import full_attention
from dlm.models.decoding_spec import DecodingSpec

ROUNDING = 1e-5  # what a cosine lacks of 1 at most where values differ by rounding, in bf16 too


@register("dllm-cache")
@dataclass(frozen=True)
class DLLMCache(Policy):
    """Query tokens for P=1000, G=S=256: 29,488, and 56,064 rows of values; the first layer computes the whole canvas.

    Attributes:
        prompt_interval: Kp, forwards from one refresh of the prompt to the next (the authors: 25 to 100).
        gen_interval: Kr, the same for the response (the authors: 2 to 8).
        ratio: share of the response's rows that is computed anew in between.

    Raises:
        ValueError: an interval < 1, or a ratio outside [0, 1].
    """

    prompt_interval: int = 50
    gen_interval: int = 7
    ratio: float = 0.25

    prunes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("prompt_interval", "gen_interval"):
            if getattr(self, name) is None:
                raise ValueError(f"{name}=None: the first forward must fill the cache; use a number of forwards")
            check_interval(name, getattr(self, name))
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio} is no share of the response; use 0 to 1, for example 0.25")

    def check(self, spec: DecodingSpec) -> None:
        """Raises ValueError for a block-causal model."""
        if spec.block is not None:
            raise ValueError(
                "cache dllm-cache computes all rows of a layer alike; a block-causal model has cache block"
            )

    def begin(self, canvas: Canvas, model: Any) -> Run:
        """A run with every row before its first refresh."""
        return _Run(canvas, self)


class _Run(Run):
    def __init__(self, canvas: Canvas, policy: DLLMCache) -> None:
        super().__init__(canvas, LayerCache(canvas, policy))
        self.policy = policy

    def logit_window(self) -> tuple[torch.Tensor, torch.Tensor]:
        """From the active block to the end of the canvas: int64 [batch] each."""
        return self.from_block()

    def plan(self, wanted: torch.Tensor) -> Plan:
        """Says which part is due; all rows go in, and the layers choose the drifting ones themselves."""
        canvas, policy, cache = self.canvas, self.policy, self.cache
        cache.prompt_due = self.forwards % policy.prompt_interval == 0
        cache.response_due = self.forwards % policy.gen_interval == 0
        self.forwards += 1
        response = [canvas.length - head for head in canvas.heads]
        prompt = sum(canvas.heads) - int(canvas.real_start_cpu.sum()) if cache.prompt_due else 0
        # Nothing of the response is due: `drifting` of its rows per layer, the share rho of the paper.
        tokens = sum(response if cache.response_due else cache.drifting())
        # To find the rows that drifted, the values of all response rows are projected (the paper's V-verify).
        values = 0 if cache.response_due else sum(response)
        return Plan(slice(0, canvas.length), canvas.valid, prompt + tokens, values)


class BranchLayer(SlotLayer):
    """One layer's k, v [batch, kv_heads, L, head_dim] and branches a, f [batch, L, width]."""

    def __init__(self, cache: LayerCache) -> None:
        super().__init__(cache)
        self.a: torch.Tensor | None = None
        self.f: torch.Tensor | None = None

    def drive(
        self, layer: Any, hidden: torch.Tensor, rows: Packing | None, rope: tuple, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The model's layer over hidden [batch, L, width], where only `rows` are computed; None = all.

        The values of the whole response must be in `self.v` already, see `drifted`.
        """
        if rows is not None and len(rows) == 0:
            # Both branches as they were kept; only the residual stream is today's.
            return hidden + self.a + self.f
        normed = layer.input_norm(hidden if rows is None else rows.take(hidden))
        if rows is not None:
            rope = tuple(rows.take(table.flatten(0, -3).expand(len(hidden), -1, -1)).unsqueeze(1) for table in rope)
        query, key = layer.qk(normed, rope)
        # Before attention: the chosen queries must see their own new keys.
        self._put(rows, key, layer.v(normed), hidden)
        # The chosen queries, and the keys of all L slots.
        branch = by_rows(rows, query, lambda q: full_attention(q, self.k, self.v, layer.scaling, mask))
        branch = layer.to_out(branch.transpose(1, 2).flatten(2))
        self.a = branch if rows is None else rows.put(self.a, branch)
        hidden = hidden + self.a
        branch = layer.ffn(hidden if rows is None else rows.take(hidden))
        self.f = branch if rows is None else rows.put(self.f, branch)
        return hidden + self.f

    def drifted(self, values: torch.Tensor, response: Packing, chosen: Packing) -> Packing:
        """Takes new values [1, kv_heads, T, head_dim] of the slots of `response`; those that they changed most, by
        cosine over all heads, as many in each row as `chosen` has entries. Ties go to the lowest slot."""
        # Compared before they are replaced: the change since the values were last taken in is what counts.
        kept = self.v[response.rows, :, response.slots]
        similarity = F.cosine_similarity(values[0].transpose(0, 1).flatten(1).float(), kept.flatten(1).float(), dim=-1)
        response.store(self.v, values)
        # Rounding alone is no change: where nothing was written since, batch and lone row would choose other slots.
        similarity = similarity.where(similarity < 1 - ROUNDING, 1.0)
        # By rows; a short row's filler comes behind all that it has, and `chosen` has fewer.
        table = similarity.new_full((len(response.grid), self.v.shape[2]), torch.inf)
        table[response.rows, response.slots] = similarity
        order = table.argsort(dim=1, stable=True)
        return replace(chosen, slots=order[chosen.rows, chosen.columns])

    def tensors(self) -> list[torch.Tensor]:
        """Keys, values and what the two branches gave."""
        return super().tensors() + [x for x in (self.a, self.f) if x is not None]

    def take_rows(self, rows: torch.Tensor) -> None:
        """Keeps rows int64 [kept] of the batch."""
        super().take_rows(rows)
        self.a, self.f = self.a[rows], self.f[rows]

    def _put(self, rows: Packing | None, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor) -> None:
        if rows is None:
            self.k, self.v = key, value
            return
        if self.k is None:
            # The first forward of a padded batch: what is padding stays zero and is never seen.
            shape = (len(hidden), key.shape[1], hidden.shape[1], key.shape[3])
            self.k, self.v = key.new_zeros(shape), key.new_zeros(shape)
            self.a = self.f = torch.zeros_like(hidden)
        rows.store(self.k, key)
        rows.store(self.v, value)


class LayerCache(SlotCache):
    """What runs the model's layers in pieces.

    Attributes:
        prompt_due, response_due: whether the part is computed anew in this forward.
    """

    drives_layers = True
    layer_class = BranchLayer

    def __init__(self, canvas: Canvas, policy: DLLMCache) -> None:
        super().__init__(canvas.length)
        self.canvas, self.ratio = canvas, policy.ratio
        self.prompt_due = self.response_due = True
        self._parts: dict[Any, Packing] = {}

    def drifting(self) -> list[int]:
        """Slots of each row's response that are computed anew when it is not due."""
        return [int(self.ratio * (self.length - head)) for head in self.canvas.heads]

    def drive(self, layer: Any, hidden: torch.Tensor, rope: tuple, mask: torch.Tensor | None) -> torch.Tensor:
        """The model's `layer` over hidden states [batch, L, width]; called by the layer's own forward."""
        if layer.layer_idx == 0:
            # Computed in full each time: nothing is kept.
            return BranchLayer(self).drive(layer, hidden, self._part(hidden, True, True), rope, mask)
        store = self.layer(layer.layer_idx - 1)
        if self.response_due:
            return store.drive(layer, hidden, self._part(hidden, self.prompt_due, True), rope, mask)
        response = self._part(hidden, False, True)
        values = layer.v(layer.input_norm(response.take(hidden)))
        rows = store.drifted(values, response, self._chosen(hidden))
        if self.prompt_due:
            rows = self._part(hidden, True, False).joined(rows)
        return store.drive(layer, hidden, rows, rope, mask)

    def _part(self, hidden: torch.Tensor, prompt: bool, response: bool) -> Packing | None:
        """The real slots of prompt, response or both, None for all of an unpadded canvas; made once for a batch."""
        if prompt and response and self.canvas.valid is None:
            return None
        key = (prompt, response)
        if key not in self._parts:
            behind = torch.arange(self.length)[None] >= torch.tensor(self.canvas.heads)[:, None]
            wanted = (behind & response) | (~behind & prompt)
            if prompt and self.canvas.valid is not None:
                wanted &= self.canvas.valid.cpu()
            self._parts[key] = Packing.of(wanted, hidden.device).repeated(len(hidden) // self.canvas.batch)
        return self._parts[key]

    def _chosen(self, hidden: torch.Tensor) -> Packing:
        """As many entries as each row's `drifting`; which slots they are, the layers say."""
        if "chosen" not in self._parts:
            wanted = torch.arange(self.length)[None] < torch.tensor(self.drifting())[:, None]
            self._parts["chosen"] = Packing.of(wanted, hidden.device).repeated(len(hidden) // self.canvas.batch)
        return self._parts["chosen"]

    def take_rows(self, rows: torch.Tensor, batch: int) -> None:
        """Keeps rows int64 [kept] of a canvas of `batch` rows."""
        super().take_rows(rows, batch)
        self._parts.clear()
