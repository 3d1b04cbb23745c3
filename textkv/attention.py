"""The attention and mask functions that we register with transformers, one pair for each implementation that a model
may have had before.

All are pure: state lives in the cache layer that a view points back to. What is not a call on one of our caches is
handed on to the implementation and the mask that the model had, so that training, packed texts, static caches and
plain forwards give what they gave before.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from textkv import probes
from textkv.call import Call
from textkv.context import ATTENTION
from textkv.kinds import text_config, text_model
from textkv.layer import View
from textkv.together import Views

_BEFORE: dict[str, str] = {}
"""The implementation that each of our names stands in for."""


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | View,
    value: torch.Tensor | View,
    attention_mask: torch.Tensor | Call | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    before: str,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of [batch, heads, m, head_dim] queries; returns ([batch, m, heads, head_dim], weights or None).

    Raises:
        ValueError: an argument that changes the scores in a way that the cache does not know.
    """
    rotary, hidden, ids, seen = (kwargs.pop(name, None) for name in (probes.ROTARY, probes.HIDDEN, probes.IDS, CAPTURE))
    if seen is not None:
        new = key.k if isinstance(key, View) else key
        seen(module.layer_idx, (new.detach(), query.detach()))
    if isinstance(key, Views):
        told = {"rotary": rotary, "hidden": hidden, "ids": ids, "dropout": dropout, "scaling": scaling}
        return _each(module, query, key, attention_mask, before=before, **told, **kwargs), None
    if not isinstance(key, View):
        if isinstance(attention_mask, Call):
            raise ValueError(
                f"layer {module.layer_idx} was not given the cache that the call brings: gradient checkpointing takes "
                "it away while a model trains; call model.eval() first, or leave past_key_values out"
            )
        # Looked up at every call: another library may wrap the registry's functions after us.
        function = _eager(module) if before == "eager" else ALL_ATTENTION_FUNCTIONS[before]
        return function(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    # A score that we do not know of would be missing in silence.
    wrong = [name for name in ("position_bias", "indices") if kwargs.get(name) is not None]
    if wrong:
        raise ValueError(f"{type(module).__name__} passes {wrong[0]} to attention, which this cache does not support")
    out = key.layer.step(
        key, query, module=module, mask=attention_mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"), sinks=kwargs.get("s_aux"), rotary=rotary, hidden=hidden, ids=ids,
    )  # fmt: skip
    # No weights: nobody can ask for what eviction has thrown away.
    return out.transpose(1, 2).contiguous(), None


def _each(
    module: torch.nn.Module,
    query: torch.Tensor,
    views: Views,
    call: Call,
    rotary: Any,
    hidden: Any,
    ids: Any,
    **told: Any,
) -> torch.Tensor:
    """Attention of several caches' queries, which lie one behind the other, each over its own."""
    out = []
    sizes = [(part.stop - part.start, view.layer.seen) for view, part in views.parts]
    for (view, part), own in zip(views.parts, call.of_rows(sizes), strict=True):
        seen = {
            probes.ROTARY: None if rotary is None else rotary[..., part],
            probes.HIDDEN: None if hidden is None else hidden[:, part],
            probes.IDS: None if ids is None else ids[:, part],
        }
        out.append(attention(module, query[:, :, part], view, view, own, **seen, **told)[0])
    return torch.cat(out, 1)


CAPTURE = "textkv_capture"
"""Name of a function that a call may pass down: it gets each layer's number, new keys and queries. No dictionary:
accelerate's hooks hand on a copy of one."""


def mask(attention_mask: torch.Tensor | Call | None = None, *, before: str, **kwargs: Any) -> Any:
    """The mask of a forward: a `Call` where one of our layers told the sizes, else what the model had before."""
    if isinstance(attention_mask, Call):
        return attention_mask
    # Our layers give False for the offset: arithmetic takes it for 0, and nobody else gives it.
    if kwargs.get("kv_offset") is False:
        function = None if kwargs.get("allow_is_causal_skip", True) else kwargs["mask_function"]
        local = kwargs.get("local_size") is not None or _hides_the_first(function, kwargs["kv_length"] - 1, kwargs)
        past = kwargs["kv_length"] - kwargs["q_length"]
        return Call(attention_mask, kwargs["q_length"], past, function, local=local)
    if getattr(kwargs.get("config"), "kv_sharing_modes", None) is not None:
        # Such models cut the mask down to the last queries, unless it is None and the implementation is called sdpa.
        kwargs["allow_is_causal_skip"] = False
    if before not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[before](attention_mask=attention_mask, **kwargs)


def _hides_the_first(function: Any, last: int, kwargs: dict) -> bool:
    """Whether a mask function knows a window of which nothing else tells (Gemma 3 with images): column `last` may not
    see the first one. Where it may, a window is too wide to matter."""
    if function is None:
        return False
    none = torch.zeros((), dtype=torch.long, device=kwargs.get("device"))
    return not bool(function(none, none, none + last, none))


def use(model: PreTrainedModel) -> PreTrainedModel:
    """Puts the model's text attention on this cache; a vision tower keeps its own. Returns the model.

    Calls without a cache of ours give what they gave before; `release` undoes it.

    Raises:
        ValueError: the model does not take its attention from transformers' registry.
    """
    decoder = text_model(model)
    before = decoder.config._attn_implementation or "eager"
    # The model is on ours already: a second wrapper would hand on to the first.
    if before in _BEFORE:
        return model
    name = f"{ATTENTION}_{before.replace('/', '--')}"
    if name not in _BEFORE:
        # A cache decides on the host what happens next, which a compiled graph would freeze.
        AttentionInterface.register(name, torch.compiler.disable(partial(attention, before=before)))
        AttentionMaskInterface.register(name, torch.compiler.disable(partial(mask, before=before)))
        _BEFORE[name] = before
    decoder.set_attn_implementation(name)
    if not runs_on_ours(text_config(model)):
        raise ValueError(
            f"{type(model).__name__} runs attention {decoder.config._attn_implementation!r} and cannot be switched to "
            "another, so no cache can attend for it"
        )
    return model


def release(model: PreTrainedModel) -> PreTrainedModel:
    """Gives the model back the attention that it had before `use` (or a `MethodCache`), and takes our hooks away."""
    decoder = text_model(model)
    before = _BEFORE.get(decoder.config._attn_implementation)
    if before is not None:
        decoder.set_attn_implementation(before)
    probes.remove(model)
    return model


def runs_on_ours(config: Any) -> bool:
    """Whether a decoder's configuration names one of our attention functions."""
    return config._attn_implementation in _BEFORE


def _eager(module: torch.nn.Module):
    """The plain attention function of the file in which a module's forward was written."""
    forward = inspect.unwrap(type(module).forward)
    return forward.__globals__["eager_attention_forward"]
