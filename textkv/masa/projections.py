"""Which weights of a model are its attention projections, layer by layer.

Llama, Qwen2 and their kin, and transformers' ViT, call them q_proj, k_proj, v_proj and o_proj beside each other in each
block of one list. What is named or fused otherwise is refused: a guess would share the wrong matrices.
"""

from __future__ import annotations

import re

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

QKVO = "qkvo"
_BLOCK = re.compile(r"^(?P<stack>.*?)(?P<number>\d+)\.(?P<attention>.*)\.q_proj$")


def check_projections(projections: str) -> str:
    """`projections` as distinct letters of "qkvo". Raises ValueError for anything else."""
    if not projections or set(projections) - set(QKVO) or len(set(projections)) != len(projections):
        raise ValueError(f"projections={projections!r} is not a choice of letters of {QKVO}; use qkv or qkvo")
    return projections


def find_projections(model: nn.Module, projections: str = QKVO) -> dict[str, dict[str, nn.Linear]]:
    """{letter: {name in the model: projection, in the order of the layers}} for each letter of `projections`.

    Raises:
        ValueError: no such layers, several stacks of them, fewer than two layers, projections that are no linear layers
            of floating point numbers (quantised ones), that are tied to each other, of different shapes in different
            layers, or that hold numbers which are not finite.
    """
    modules = dict(model.named_modules())
    blocks = [match for name in modules if (match := _BLOCK.match(name))]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no layers with q_proj, k_proj, v_proj and o_proj apart; fused or differently "
            "named projections cannot be shared"
        )
    stacks = sorted({match["stack"] for match in blocks})
    if len(stacks) > 1:
        raise ValueError(f"attention layers lie in {', '.join(stacks)}; pass the one part of the model to be shared")
    if len(blocks) < 2:
        raise ValueError("a group of one layer shares nothing; use a model of at least two layers")
    found = {}
    for letter in check_projections(projections):
        names = [match.string.removesuffix("q_proj") + f"{letter}_proj" for match in blocks]
        found[letter] = {name: _checked(name, modules.get(name)) for name in names}
        _check_alike(found[letter])
    return found


def _checked(name: str, module: nn.Module | None) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        told = "is missing" if module is None else f"is a {type(module).__name__}"
        raise ValueError(f"{name} {told}, not a plain linear layer; quantised or adapted models cannot be shared")
    if is_parametrized(module, "weight"):
        raise ValueError(f"{name} is parametrised already; share a model once, or export it first")
    if not module.weight.is_floating_point():
        raise ValueError(f"{name} holds {module.weight.dtype}; quantised models cannot be shared, load them in float32")
    if not bool(module.weight.isfinite().all()):
        raise ValueError(f"{name} holds numbers that are not finite; take other weights")
    return module


def _check_alike(found: dict[str, nn.Linear]) -> None:
    first, *others = found
    shape = tuple(found[first].weight.shape)
    for name in others:
        if (here := tuple(found[name].weight.shape)) != shape:
            raise ValueError(f"{name} is {list(here)}, {first} is {list(shape)}; only layers of one shape share atoms")
    if len({module.weight.data_ptr() for module in found.values()}) < len(found):
        raise ValueError(f"layers of {first} hold the same weight already (tied); load a model without tied layers")
