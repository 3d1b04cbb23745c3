"""Selective recomputation, the idea of CacheBlend (arXiv 2405.16444), as something to compare with: bases are put
together without offsets, and the tokens whose KV is most wrong are read again.

Which tokens these are, an early layer tells: all tokens run through the first layers, whose KV is exact then, and those
that differ most from their base there are recomputed in all layers. No anchors, but a share of the prefill.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from textkv.kinds import attention_modules
from textkv.reuse.kvcomm.engine import Reading
from textkv.reuse.kvcomm.sharing import Based
from textkv.reuse.kvcomm.template import Part, Segment, ids_of
from textkv.reuse.spans import Span

LOOK = 1
"""The layer whose KV tells which tokens are wrong: the first one that saw other tokens."""


class _Enough(Exception):
    """The first layers have run."""


class Recompute(Based):
    """Reads again a share of each prompt's tokens.

    Args:
        share: of the tokens, in (0, 1]; the paper finds 0.15 enough.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new: int = 32, *, share: float = 0.15
    ) -> None:
        super().__init__(model, tokenizer, max_new)
        if not 0 < share <= 1:
            raise ValueError(f"share={share}: the tokens to read again are a share in (0, 1], e.g. 0.15")
        self.share = share

    def _read(self, agent: str, parts: tuple[Part, ...], given: Mapping[str, Segment]) -> Reading:
        if self._axes:
            raise ValueError(
                f"{type(self.model).__name__}: tokens of pictures cannot be read again one by one; use Prefix or KVComm"
            )
        ids = torch.tensor([ids_of(parts)], device=self.model.device)
        whole = self.spans.placed([self._base(agent, part, given) for part in parts])
        keys, values = whole.keys.clone(), whole.values.clone()
        wrong = self._first_layers(ids, keys, values)
        count = max(1, math.ceil(self.share * ids.shape[1]))
        # The last token gives the answer's first: it is always read.
        wrong[-1] = torch.inf
        chosen = wrong.topk(count).indices.sort().values
        logits = self._read_again(ids, chosen, keys, values)
        cache = self.spans.cache(Span(keys, values))
        why = f"{count} of {ids.shape[1]} tokens were read again"
        return Reading(cache, logits, count, True, why)

    def _first_layers(self, ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Puts the exact KV of the first layers into keys and values [layers, kv_heads, tokens, head_dim]; returns how
        wrong each token was there, fp32 [tokens]."""

        def stop(module, args, output):
            raise _Enough

        modules = attention_modules(self.model)
        look = min(LOOK, len(modules) - 1)
        cache, hook = DynamicCache(), modules[look].register_forward_hook(stop)
        try:
            with suppress(_Enough):
                self.model(ids, past_key_values=cache, logits_to_keep=1)
        finally:
            hook.remove()
        apart = torch.zeros(ids.shape[1], device=ids.device)
        for ours, name in ((keys, "keys"), (values, "values")):
            exact = torch.cat([getattr(cache.layers[number], name) for number in range(look + 1)])
            apart = apart + (ours[look].float() - exact[look].float()).square().sum((0, 2)).sqrt()
            ours[: look + 1] = exact
        return apart

    def _read_again(
        self, ids: torch.Tensor, chosen: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Runs the chosen tokens over the KV of all others before them, and puts theirs in place; logits [vocabulary]
        after the last."""
        every = torch.arange(ids.shape[1], device=ids.device)
        others = every[~torch.isin(every, chosen)]
        cache = DynamicCache()
        for number in range(len(keys)):
            cache.update(keys[number][None][:, :, others], values[number][None][:, :, others], number)
        at = torch.cat([others, chosen])
        seen = (at <= chosen[:, None])[None, None]
        given = {"attention_mask": seen, "position_ids": chosen[None], "past_key_values": cache}
        logits = self.model(ids[:, chosen], **given, logits_to_keep=1).logits[0, -1]
        for number, layer in enumerate(cache.layers):
            keys[number][:, chosen] = layer.keys[0, :, len(others) :]
            values[number][:, chosen] = layer.values[0, :, len(others) :]
        return logits
