"""A text that is read onto a cache while it is watched: what each token attended to, and what it stood for.

ATLAS (arXiv 2504.01281, 2B) looks at attention rows of all layers and at hidden states. Fused attention returns no
rows, so those that are asked for are computed again, from the queries that the model used and the keys that the cache
still holds: a token that was evicted has no column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from textkv.attention import CAPTURE
from textkv.cache import MethodCache
from textkv.layer import Layer
from textkv.rag.answer import Reader


@dataclass
class Watched:
    """One text on its cache.

    Attributes:
        ids: token ids read so far; the place of a token is its logical position in the cache.
        telling: for each token, whether it belongs to the text itself, and not to a template around it.
        pooled: fp32 [tokens, hidden], each token's hidden states of all layers in one (see `pool`).
        queries: post-RoPE queries [layers, heads, 1, head_dim] of tokens that were read one by one, by their place.
    """

    reader: Reader
    cache: MethodCache
    ids: list[int] = field(default_factory=list)
    telling: list[bool] = field(default_factory=list)
    pooled: torch.Tensor | None = None
    queries: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, reader: Reader) -> Watched:
        """Nothing read yet, on a new cache of the reader's method.

        Raises:
            ValueError: a method whose keys do not keep their positions: queries of before cannot be laid on them.
        """
        cache = reader.empty()
        if not cache.method.capabilities.original_positions:
            raise ValueError(f"cache {reader.cache} turns keys to other positions; take one that keeps them, or full")
        return cls(reader, cache)

    def fork(self) -> Watched:
        """An independent copy, on a fork of the cache."""
        return Watched(
            self.reader, self.cache.fork(), list(self.ids), list(self.telling), self.pooled, dict(self.queries)
        )

    @torch.inference_mode()
    def read(self, ids: list[int], telling: bool | Sequence[bool] = True) -> torch.Tensor:
        """Reads tokens in one forward; the logits after the last one, fp32 [vocabulary] on the CPU.

        Args:
            telling: of all of them, or of each.

        Raises:
            ValueError: no tokens.
        """
        if not ids:
            raise ValueError("0 tokens cannot be read; give at least 1")
        model, seen = self.reader.model, {}
        given = torch.tensor([ids], device=model.device)
        asked = {"logits_to_keep": 1, "output_hidden_states": True, CAPTURE: seen.__setitem__}
        out = model(given, past_key_values=self.cache, **asked)
        new = pool(torch.stack(out.hidden_states[1:])[:, 0])
        self.pooled = new if self.pooled is None else torch.cat([self.pooled, new])
        if len(ids) == 1:
            self.queries[len(self.ids)] = torch.stack([seen[layer.kind.number][1][0] for layer in self.layers])
        self.ids += ids
        self.telling += [telling] * len(ids) if isinstance(telling, bool) else telling
        return out.logits[0, -1].float().cpu()

    @property
    def layers(self) -> list[Layer]:
        """The layers of full attention."""
        return self.cache.context.layers

    @torch.inference_mode()
    def rows(self, places: list[int]) -> torch.Tensor:
        """Attention of the tokens at these places, which were read one by one: fp32 [layers, heads, m, tokens read].

        A token sees those before it and itself. Columns of evicted tokens are 0.
        """
        queries = torch.stack([self.queries[place] for place in places], 2)[..., 0, :]
        at = torch.tensor(places, device=queries.device)
        return torch.stack([self._rows(layer, q, at) for layer, q in zip(self.layers, queries, strict=True)])

    def _rows(self, layer: Layer, queries: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Of one layer: queries [heads, m, head_dim] to fp32 [heads, m, tokens read]."""
        stored = layer.stored()
        keys, positions = stored.keys[0].float(), stored.positions[0].long()
        group = queries.shape[0] // keys.shape[0]
        scores = layer.softmax.scores(queries.float().unflatten(0, (-1, group)) @ keys[:, None].mT)
        unseen = (positions[:, None, None] > at[:, None]) | (positions[:, None, None] < 0)
        rows = layer.softmax.weights(scores.masked_fill(unseen, float("-inf"))[None])[0].nan_to_num()
        made = rows.new_zeros(*rows.shape[:-1], len(self.ids))
        made.scatter_add_(-1, positions[:, None, None].clamp(min=0).expand_as(rows), rows)
        return made.flatten(0, 1)


def pool(states: torch.Tensor) -> torch.Tensor:
    """e_j = sum_l delta_l h_lj with delta = softmax(l / 2): hidden states [layers, tokens, hidden] to fp32 [tokens,
    hidden]. Four tenths of it are the last layer."""
    number = torch.arange(1, len(states) + 1, device=states.device)
    return torch.einsum("l,lth->th", (number / 2.0).softmax(0), states.float())
