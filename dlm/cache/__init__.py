"""Cache policies for diffusion language models: which slots of the canvas are computed anew in each forward.

"none", "freecache(delay=0)", "prefix", "dual", "dkv(4)", "dllm-cache(ratio=0.5)"; and FreeCache with a method of textkv
for its frozen slots, "freecache+snapkv(0.3)": a share or "512t" in front of a method's arguments is its budget.
"""

from __future__ import annotations

from dataclasses import fields

import textkv
from dlm.cache.base import REGISTRY, Policy, Run, find, register
from dlm.cache.dkv import DKVCache
from dlm.cache.dllm_cache import DLLMCache
from dlm.cache.fast_dllm import DualCache, PrefixCache
from dlm.cache.freecache import FreeCache
from dlm.cache.none import NoCache
from dlm.cache.plan import Plan
from dlm.cache.slots import SlotCache
from textkv.budgets import Budget
from textkv.expression import parse_call, split_parts
from textkv.method import Method

__all__ = [
    "DKVCache",
    "DLLMCache",
    "DualCache",
    "FreeCache",
    "NoCache",
    "Plan",
    "Policy",
    "PrefixCache",
    "Run",
    "SlotCache",
    "list_caches",
    "register",
    "resolve_cache",
]


def list_caches() -> list[str]:
    """Names of all registered policies, sorted."""
    return REGISTRY.names()


def resolve_cache(expression: str | Policy) -> Policy:
    """Builds a policy from "name", "name(x, key=y)" or "freecache+method(budget)".

    Raises:
        ValueError: unknown name (with the nearest ones), malformed text, a bad argument, a method behind another
            policy than freecache, or one that cannot keep frozen slots.
    """
    if isinstance(expression, Policy):
        return expression
    first, *methods = split_parts(expression)
    name, args, kwargs = parse_call(first)
    policy = find(name)
    if methods:
        # The others write their slots again at a refresh; what a method has packed or dropped cannot be rewritten.
        if policy is not FreeCache:
            raise ValueError(
                f"cache {expression!r}: only freecache freezes slots for good; write freecache+{'+'.join(methods)}"
            )
        kwargs["method"] = _resolve_methods(methods)
    try:
        return policy(*args, **kwargs)
    except TypeError as error:
        known = ", ".join(f.name for f in fields(policy) if f.name != "method") or "none"
        raise ValueError(f"cache {first!r}: {error}; its arguments are: {known}") from None


def _resolve_methods(parts: list[str]) -> Method:
    """A textkv method from the parts behind freecache, budgets read out of their arguments."""
    # One budget for the whole composition, wherever it was written: snapkv(0.3)+adakv is adakv over 0.3.
    plain, budget = [], None
    for part in parts:
        name, args, kwargs = parse_call(part)
        # snapkv(0.3) is a budget; an int in front is the method's own first argument, as in kivi(4).
        if args and isinstance(args[0], float | str):
            budget = args.pop(0)
        budget = kwargs.pop("budget", budget)
        given = [repr(x) for x in args] + [f"{key}={value!r}" for key, value in kwargs.items()]
        plain.append(f"{name}({','.join(given)})" if given else name)
    return textkv.resolve_method("+".join(plain), None if budget is None else Budget.parse(budget))
