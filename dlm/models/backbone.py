"""What LLaDA and Dream share: a pre-norm transformer without a causal mask, its layer, and the forward.

The two differ in the names of their modules (those of the published checkpoints, so that weights load and save key by
key), in biases and in the precision of the rotation. A subclass builds the modules under those names and tells this
file where they are. The layer is made of four small steps so that a cache policy may run it in pieces.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from dlm.models.attention import ATTENTION
from dlm.models.decoding_spec import DecodingSpec

Rope = tuple[torch.Tensor, torch.Tensor]


@cache
def constant(value: float) -> torch.Tensor:
    """A number as an fp32 tensor without dimensions, on the CPU; works with tensors of every device."""
    # Made outside of inference mode: what is made inside of it no backward pass may keep.
    with torch.inference_mode(False), torch.device("cpu"):
        return torch.tensor(float(value), dtype=torch.float32)


class RMSNorm(nn.Module):
    """Divides by the root mean square in fp32, goes back to the dtype of the model, then scales."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` [.., size] by its root mean square, times the weights; in the dtype of `hidden`."""
        # fp32 as in Llama: the mean of squares of thousands of bf16 numbers loses its small terms.
        exact = hidden.float()
        # Tensors without dimensions, not numbers: each number would be made into one and copied, at every norm.
        mean = (exact * exact).sum(-1, keepdim=True) / constant(hidden.shape[-1])
        exact = exact * torch.rsqrt(mean + constant(self.eps))
        # Rounded before it is scaled, in the order of the published code: the other order differs in the last bit.
        return self.weight * exact.to(hidden.dtype)


def rope_tables(position_ids: torch.Tensor, head_dim: int, theta: float) -> Rope:
    """Cosines and sines [batch, q, head_dim / 2] in fp32 of the angles position * theta^(-2j / head_dim)."""
    # fp32 whatever the model's dtype: bf16 has no odd integers above 256, and positions would coincide.
    angles = position_ids[..., None].float() * rope_frequencies(head_dim, theta, position_ids.device)
    return angles.cos(), angles.sin()


def rope_frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> torch.Tensor:
    """theta^(-2j / head_dim), fp32 [head_dim / 2]."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)


def head_dim_of(config: PreTrainedConfig) -> int:
    """Dimensions of a head. Not always width / heads: SDAR-4B has 32 heads of 128 in a width of 2,560."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotated_of(config: PreTrainedConfig) -> int:
    """Dimensions of a head that the rotary embedding turns, from the first on."""
    return int(head_dim_of(config) * getattr(config, "partial_rotary_factor", 1.0))


def full_tables(rope: Rope) -> Rope:
    """Cosines and signed sines [batch, 1, q, rotated] for `rotate`, of tables half as wide; once per forward."""
    cos, sin = rope
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """RoPE of x [batch, heads, q, head_dim], first half against second half, in the precision of the tables.

    `rope` is what `full_tables` gives; where it is narrower than the heads, the dimensions behind pass as they are.
    """
    cos, sin = rope
    width, dtype = cos.shape[-1], x.dtype
    if width < x.shape[-1]:
        return torch.cat((rotate(x[..., :width], rope), x[..., width:]), dim=-1)
    x = x if dtype == cos.dtype else x.to(cos.dtype)
    # Half against half, as Llama and Qwen2 store their weights; interleaved pairs would need permuted projections.
    out = x * cos + x.roll(width // 2, -1) * sin
    return out if dtype == cos.dtype else out.to(dtype)


def refuse(config: PreTrainedConfig, given: dict[str, Any], fixed: dict[str, tuple]) -> None:
    """Raises ValueError naming the field if `given` has a value that the published graph does not have.

    `fixed` maps a field to the values that mean the published graph; the first is named in the message.
    """
    for name, allowed in fixed.items():
        value = given.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not supported: this {config.model_type} network has {allowed[0]!r}")


class Layer(GradientCheckpointingLayer):
    """One transformer layer over hidden states [batch, q, width].

    A subclass gives the modules `input_norm`, `to_q`, `to_k`, `to_v`, `to_out`, `ffn_norm`, `gate`, `up`, `down`; or
    other ways to the same: `project` for queries, keys and values, `mix` for the feed-forward. `q_norm` and `k_norm`
    scale every head before the rotation where a model has them.
    """

    is_causal = False
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = head_dim_of(config)
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def project(self, normed: torch.Tensor, part: Literal["q", "k", "v"]) -> torch.Tensor:
        """Queries, keys or values [batch, q, heads * head_dim] of normed states, before norms and rotation."""
        return {"q": self.to_q, "k": self.to_k, "v": self.to_v}[part](normed)

    def qk(self, normed: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated queries [batch, heads, q, head_dim] and keys [batch, kv_heads, q, head_dim] of normed states."""
        query, key = self._heads(self.project(normed, "q")), self._heads(self.project(normed, "k"))
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return rotate(query, rope), rotate(key, rope)

    def v(self, normed: torch.Tensor) -> torch.Tensor:
        """Values [batch, kv_heads, q, head_dim] of normed states."""
        return self._heads(self.project(normed, "v"))

    def attend(
        self, query: torch.Tensor, key: torch.Tensor | Any, value: torch.Tensor | Any, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The attention branch [batch, q, width]: keys and values are tensors, or what a cache's `update` returned."""
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, _ = function(self, query, key, value, mask, dropout=0.0, scaling=self.scaling)
        return self.to_out(out.flatten(2))

    def ffn(self, hidden: torch.Tensor) -> torch.Tensor:
        """The feed-forward branch [batch, q, width], its norm included."""
        return self.mix(self.ffn_norm(hidden))

    def mix(self, normed: torch.Tensor) -> torch.Tensor:
        """The feed-forward of normed states [batch, q, width]."""
        return self.down(F.silu(self.gate(normed)) * self.up(normed))

    def forward(
        self,
        hidden: torch.Tensor,
        rope: Rope,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any | None = None,
    ) -> torch.Tensor:
        """One layer's output [batch, q, width] in the dtype of `hidden`, which has the same shape.

        Args:
            rope: cosines and signed sines of the queries' positions [batch, 1, q, rotated], see `full_tables`.
            attention_mask: broadcastable to [batch, heads, q, keys], or None: all see all.
            past_key_values: takes the new keys and values in and returns what is attended; one that `drives_layers`
                computes the layer itself (dLLM-Cache). None = nothing is stored.
        """
        # dLLM-Cache keeps whole branches, so it needs the layer in pieces and not only its keys and values.
        if getattr(past_key_values, "drives_layers", False):
            return past_key_values.drive(self, hidden, rope, attention_mask)
        normed = self.input_norm(hidden)
        # Rotated before the cache sees them: slots never move, so a key is rotated once and for all.
        query, key = self.qk(normed, rope)
        value = self.v(normed)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        hidden = hidden + self.attend(query, key, value, attention_mask)
        return hidden + self.ffn(hidden)


class MaskedDiffusionModel(PreTrainedModel):
    """A diffusion language model: tokens and masks in, raw logits out.

    A subclass gives the modules `embed`, `layers`, `final_norm`, `head` and the class attributes. `end_ids` are further
    tokens that end an answer; `load_model` takes them from the tokenizer.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    shift: ClassVar[Literal[0, 1]]
    unmask: ClassVar[str]
    rope_dtype: ClassVar[torch.dtype | None]
    context_advised: ClassVar[int | None] = None
    sub_block: ClassVar[int | None] = None

    def __init__(self, config: PreTrainedConfig) -> None:
        if config._attn_implementation is None:
            # Before super().__init__, which would choose sdpa; an implementation that was asked for stays.
            config._attn_implementation = ATTENTION
        super().__init__(config)
        self.end_ids: tuple[int, ...] = ()

    @property
    def decoding_spec(self) -> DecodingSpec:
        """The model's facts; raises ValueError when its config names no mask token."""
        return self.decoding_spec_of(self.config, self.end_ids)

    @classmethod
    def decoding_spec_of(cls, config: PreTrainedConfig, end_ids: tuple[int, ...] = ()) -> DecodingSpec:
        """The spec of a model of this class with this config; errors as `DecodingSpec.of`."""
        return DecodingSpec.of(
            config, cls.shift, cls.unmask, end_ids, cls.context_advised, cls.block_of(config), cls.sub_block
        )

    @classmethod
    def block_of(cls, config: PreTrainedConfig) -> int | None:
        """B where a token sees its own block of B positions and those before; None = everything sees everything."""
        return None

    @property
    def decoding_block(self) -> int | None:
        """`block_of` this model's config."""
        return self.block_of(self.config)

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        """The output head."""
        return self.head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        logits_rows: torch.Tensor | None = None,
    ) -> MaskedLMOutput:
        """Raw logits, not shifted: [batch, q, vocabulary], or [batch, r, vocabulary] of the rows asked for.

        Args:
            input_ids: int64 [batch, q]; or `inputs_embeds` [batch, q, width] instead.
            attention_mask: [batch, n], true or 1 where a key may be seen; n = q without a cache, else what its slots
                are. None = all.
            position_ids: int64 [batch or 1, q]; may be left out without a cache: each row counts its visible tokens.
            past_key_values: what keeps keys and values, or None. Its `update(k, v, layer)` is called once a layer with
                post-RoPE keys; if it `drives_layers`, `drive(layer, hidden, rope, mask)` stands for the whole layer.
            logits_rows: int64 [batch, r], indices into the q rows; the head runs on these only. -1 gives a row of no
                meaning.

        Raises:
            ValueError: not exactly one of ids and embeddings, positions missing, a mask of another shape, a cache with
                another attention function.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = self._positions(hidden, attention_mask, past_key_values)
        mask = self._mask(hidden, attention_mask, position_ids, past_key_values)
        rope = self._rope(position_ids, hidden.dtype, past_key_values)
        for layer in self.layers:
            hidden = layer(hidden, rope, attention_mask=mask, past_key_values=past_key_values)
        # Before the norm and the head: with 126,464 words the head costs more than a layer, and few rows are read.
        if logits_rows is not None:
            batch = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
            hidden = hidden[batch, logits_rows.to(hidden.device)]
        return MaskedLMOutput(logits=self.head(self.final_norm(hidden)))

    def _rope(self, position_ids: torch.Tensor, dtype: torch.dtype, cache: Any | None) -> Rope:
        """Cosines and signed sines [batch, 1, q, rotated] of the positions; a cache of slots keeps those of all its
        slots, so that a generation makes them once."""
        if not hasattr(cache, "rope"):
            return self._tables(position_ids, dtype)
        if cache.rope is None:
            cache.rope = self._tables(torch.arange(cache.length, device=position_ids.device)[None], dtype)
        # The forwards of a block ask for the same positions by the same tensor.
        known = getattr(cache, "turned", None)
        if known is None or known[0] is not position_ids:
            known = position_ids, tuple(table[0, 0][position_ids].unsqueeze(1) for table in cache.rope)
            cache.turned = known
        return known[1]

    def _tables(self, position_ids: torch.Tensor, dtype: torch.dtype) -> Rope:
        rope = rope_tables(position_ids, self.rotated, self.config.rope_theta)
        # LLaDA rotates in fp32, the others in the model's dtype; following each keeps their logits to the bit.
        return full_tables(tuple(table.to(self.rope_dtype or dtype) for table in rope))

    @staticmethod
    def _positions(hidden: torch.Tensor, attention_mask: torch.Tensor | None, cache: Any | None) -> torch.Tensor:
        if cache is not None:
            raise ValueError("position_ids are missing; with a cache they say which positions the queries have")
        if attention_mask is None:
            return torch.arange(hidden.shape[1], device=hidden.device)[None]
        # Padding in front counts -1, which is no position; it is never seen, so any will do.
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)

    @property
    def rotated(self) -> int:
        """`rotated_of` this model's config."""
        return rotated_of(self.config)

    def _mask(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: Any | None,
    ) -> torch.Tensor | None:
        implementation = self.config._attn_implementation
        if cache is not None and implementation != ATTENTION:
            raise ValueError(
                f"attention {implementation!r} cannot read a cache of slots; "
                f"call model.set_attn_implementation({ATTENTION!r})"
            )
        # Our own attention function reads the mask as it is; only transformers' need it in four dimensions. Which
        # blocks are seen beside a cache says who owns the cache: it alone knows where the keys stand.
        block = self.decoding_block
        if cache is not None or (attention_mask is None and block is None):
            return attention_mask
        if attention_mask is not None and attention_mask.shape != hidden.shape[:2]:
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)}, the input has [batch, tokens] = "
                f"{list(hidden.shape[:2])}; give one value per token"
            )
        if block is not None:
            number = (position_ids // block).expand(len(hidden), -1)
            seen = number[:, None] <= number[..., None]
            if attention_mask is not None:
                seen = seen & attention_mask.bool()[:, None]
            if implementation == ATTENTION:
                return seen
            hidden_keys = torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device)
            return hidden_keys.masked_fill(~seen, torch.finfo(hidden.dtype).min)[:, None]
        return create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=attention_mask.to(hidden.device)
        )
