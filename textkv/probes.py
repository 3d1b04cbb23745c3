"""What must be seen outside of attention: rotary positions, hidden states, and where a call begins and ends.

The first cache that asks puts hooks on its model, once for all caches that will ever run on it. They look at the
`past_key_values` of the call. What they see travels on with that call, as named arguments that end in our attention
function: nothing is left on the model, so that two threads can use it.
"""

from __future__ import annotations

import inspect
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from textkv.evidence import Needs
from textkv.kinds import attention_modules, text_model, unwrapped

ROTARY, HIDDEN, IDS = "textkv_rotary", "textkv_hidden", "textkv_ids"
"""Names under which position ids [3 or 1, batch or 1, m], hidden states [batch, m, hidden_size] and token ids int64
[batch, m] travel."""
CALLS = "textkv_calls"
"""Name of the hooks that tell a cache of its model's calls: one that raises is taken back before the next."""

_PLACED: WeakKeyDictionary[torch.nn.Module, dict[str, list]] = WeakKeyDictionary()


def place(model: PreTrainedModel, needs: Needs) -> None:
    """Puts the hooks that `needs` ask for on the model, unless they are there.

    Raises:
        ValueError: hidden states are asked for and the layers pass nothing on to their attention.
    """
    decoder = text_model(model)
    for called in _called(model):
        _place_on_calls(called, needs)
    placed = _PLACED.setdefault(decoder, {})
    if (needs.rope or needs.positions) and ROTARY not in placed:
        names = list(inspect.signature(decoder.forward).parameters)
        hook = _see_positions(names.index("position_ids") if "position_ids" in names else None)
        placed[ROTARY] = [decoder.register_forward_pre_hook(hook, with_kwargs=True)]
    if needs.ids and IDS not in placed:
        placed[IDS] = [decoder.register_forward_pre_hook(_see_ids, with_kwargs=True)]
    name = f"{HIDDEN}.{needs.hidden}"
    if needs.hidden and name not in placed:
        modules = attention_modules(model)
        for number, module in modules.items():
            _check_passes_on(module, number)
        if needs.hidden == "residual":
            parents = {id(child): parent for parent in decoder.modules() for child in parent.children()}
            modules = {number: parents[id(module)] for number, module in modules.items()}
        hook = _see_hidden(needs.hidden)
        placed[name] = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules.values()]


def _called(model: PreTrainedModel) -> list[torch.nn.Module]:
    """What may be called as the model: a wrapper (PEFT, a compiled model), whose own `generate` calls what lies inside,
    and that, which some wrappers run without its hooks. Hooks that meet the same call twice do no harm."""
    return list({id(x): x for x in (model, unwrapped(model))}.values())


def _place_on_calls(model: torch.nn.Module, needs: Needs) -> None:
    calls = _PLACED.setdefault(model, {})
    if CALLS not in calls:
        calls[CALLS] = [
            model.register_forward_pre_hook(_call_begins, with_kwargs=True),
            model.register_forward_hook(_call_ends, with_kwargs=True),
        ]
    if needs.ids and IDS not in calls and model.config is not model.config.get_text_config():
        # A model of several kinds of input embeds them before its decoder is called: ids are seen where they come in.
        calls[IDS] = [model.register_forward_pre_hook(_hand_ids_on, with_kwargs=True)]


def remove(model: PreTrainedModel) -> None:
    """Takes the hooks away again."""
    for module in (*_called(model), text_model(model)):
        for handles in _PLACED.pop(module, {}).values():
            for handle in handles:
                handle.remove()


# Of the file's own level, unlike the hooks below: a model with them can still be pickled.
@torch.compiler.disable
def _call_begins(module, args, kwargs):
    cache = kwargs.get("past_key_values")
    if hasattr(cache, "call_begins"):
        _check_call(cache, args, kwargs)
        cache.call_begins(pictures=_brings_pictures(kwargs))


def _check_call(cache, args, kwargs) -> None:
    """Raises ValueError where a call cannot mean what it says."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        raise ValueError(
            "a graph cannot be exported or traced with this cache, which decides on the host what it keeps: export the "
            "model without past_key_values, or with a static cache of transformers"
        )
    if _brings_nothing(args, kwargs):
        raise ValueError(
            f"the call brings no token to a cache that has seen {cache.get_seq_length()}: generate() takes the ids of "
            "the whole conversation and cuts off what was seen; for the new ids alone call the model itself"
        )
    # `generate` would feed the whole text at every step, behind what it fed before.
    if kwargs.get("use_cache") is False:
        raise ValueError("use_cache=False and past_key_values contradict each other: leave one of them out")


def _brings_nothing(args, kwargs) -> bool:
    """Whether a call's ids or embeddings [batch, m, ...] are none."""
    given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
    found = next((x for x in given if isinstance(x, torch.Tensor)), None)
    return found is not None and found.dim() > 1 and not found.shape[1]


def _brings_pictures(kwargs) -> bool:
    """Whether a call has any, as pixels or as `generate` has encoded them before."""
    encoded = kwargs.get("mm_encoder_outputs") or {}
    return kwargs.get("pixel_values") is not None or encoded.get("image") is not None


@torch.compiler.disable
def _call_ends(module, args, kwargs, output):
    cache = kwargs.get("past_key_values")
    if hasattr(cache, "call_ends"):
        cache.call_ends()


def _see_positions(index: int | None):
    """A hook of the decoder: hands on the position ids of a call that runs on one of our caches."""

    def hook(module, args, kwargs):
        """The call's arguments with its position ids [3 or 1, batch or 1, m], or None to leave them."""
        cache = kwargs.get("past_key_values")
        needs = getattr(getattr(cache, "context", None), "needs", None)
        if needs is None or not (needs.rope or needs.positions):
            return None
        ids = kwargs.get("position_ids", args[index] if index is not None and index < len(args) else None)
        if ids is None:  # as the decoder will count by itself
            given = kwargs.get("input_ids", args[0] if args else None)
            new = given if given is not None else kwargs["inputs_embeds"]
            ids = torch.arange(new.shape[1], device=new.device)[None] + cache.get_seq_length()
        # M-RoPE gives [3, batch, m], or four with the text's own first.
        ids = ids[None] if ids.dim() == 2 else ids[-3:]
        return args, kwargs | {ROTARY: ids}

    return hook


def _hand_ids_on(module, args, kwargs):
    """`_see_ids` for a model that hands no ids to its decoder."""
    needs = getattr(getattr(kwargs.get("past_key_values"), "context", None), "needs", None)
    ids = kwargs.get("input_ids", args[0] if args else None)
    return None if needs is None or not needs.ids or ids is None else (args, kwargs | {IDS: ids})


def _see_ids(module, args, kwargs):
    """Hands on the token ids of a call that runs on a cache which asked for them.

    Raises:
        ValueError: the call brings embeddings and no ids.
    """
    cache = kwargs.get("past_key_values")
    needs = getattr(getattr(cache, "context", None), "needs", None)
    if needs is None or not needs.ids or kwargs.get(IDS) is not None:
        return None
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None:
        raise ValueError(
            f"{cache.context.method.expression} reads token ids and the call brings embeddings; pass input_ids"
        )
    return args, kwargs | {IDS: ids}


def _see_hidden(which: str):
    """A hook of a layer or of its attention: hands on the hidden state that comes in."""

    def hook(module, args, kwargs):
        cache = kwargs.get("past_key_values")
        needs = getattr(getattr(cache, "context", None), "needs", None)
        if needs is None or needs.hidden != which:
            return None
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        return args, kwargs | {HIDDEN: hidden.detach()}

    return hook


def _check_passes_on(module: torch.nn.Module, number: int) -> None:
    parameters = inspect.signature(module.forward).parameters.values()
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"layer {number} ({type(module).__name__}) passes no named arguments on to its attention, so that hidden "
            "states cannot reach it; use a method that needs none"
        )
