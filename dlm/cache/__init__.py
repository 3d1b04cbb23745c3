"""Cache policies for diffusion language models: which slots of the canvas are computed anew in each forward.

"none", "freecache(delay=0)", "prefix", "dual", "dkv(4)", "dllm-cache(ratio=0.5)", "elastic(16, 0.9)"; "block" for
block-causal models; and FreeCache and block with a method of textkv for their frozen slots, "freecache+snapkv(0.3)": a
share or "512t" in front of a method's arguments is its budget. Behind every policy of windows "+suffix(32)" leaves out
the masks far behind the active block.
"""

from __future__ import annotations

from dataclasses import fields

import textkv
from dlm.cache.base import REGISTRY, Policy, Run, find, register
from dlm.cache.block import BlockCache
from dlm.cache.dkv import DKVCache
from dlm.cache.dllm_cache import DLLMCache
from dlm.cache.elastic import ElasticCache
from dlm.cache.fast_dllm import DualCache, PrefixCache
from dlm.cache.freecache import FreeCache
from dlm.cache.none import NoCache
from dlm.cache.plan import Plan
from dlm.cache.slots import SlotCache
from dlm.cache.suffix import Suffix
from textkv.budgets import Budget
from textkv.expression import construct, parse_call, split_parts
from textkv.method import Method

__all__ = [
    "BlockCache",
    "DKVCache",
    "DLLMCache",
    "DualCache",
    "ElasticCache",
    "FreeCache",
    "NoCache",
    "Plan",
    "Policy",
    "PrefixCache",
    "Run",
    "SlotCache",
    "Suffix",
    "list_caches",
    "register",
    "resolve_cache",
]


def list_caches(block_causal: bool = True) -> list[str]:
    """Names of all registered policies, sorted; without those that only a block-causal model can have if False."""
    return [name for name in REGISTRY.names() if block_causal or not find(name).block_causal]


def resolve_cache(expression: str | Policy) -> Policy:
    """Builds a policy from "name", "name(x, key=y)", "freecache+method(budget)" or any of them with "+suffix(w)".

    Raises:
        ValueError: unknown name (with the nearest ones), malformed text, a bad argument, a method behind another
            policy than freecache, or one that cannot keep frozen slots.
    """
    if isinstance(expression, Policy):
        return expression
    if not isinstance(expression, str):
        raise ValueError(f"cache={expression!r} is neither a text nor a Policy; write for example 'freecache'")
    first, *methods = split_parts(expression)
    pruned = [part for part in methods if parse_call(part)[0] == "suffix"]
    methods = [part for part in methods if part not in pruned]
    if pruned:
        if len(pruned) > 1:
            raise ValueError(f"cache {expression!r} has more than one suffix; leave one")
        _, args, kwargs = parse_call(pruned[0])
        policy = resolve_cache("+".join([first, *methods]))
        return construct(Suffix, f"cache {pruned[0]!r}", args, kwargs, policy=policy)
    name, args, kwargs = parse_call(first)
    policy = find(name)
    if methods:
        # The others write their slots again at a refresh; what a method has packed or dropped cannot be rewritten.
        if not any(f.name == "method" for f in fields(policy)):
            raise ValueError(
                f"cache {expression!r}: only freecache and block freeze slots for good; write "
                f"freecache+{'+'.join(methods)}"
            )
        return construct(policy, f"cache {first!r}", args, kwargs, method=_resolve_methods(methods))
    return construct(policy, f"cache {first!r}", args, kwargs)


def _resolve_methods(parts: list[str]) -> Method:
    """A textkv method from the parts behind freecache, budgets read out of their arguments."""
    # One budget for the whole composition, wherever it was written: snapkv(0.3)+adakv is adakv over 0.3.
    plain, budget, bare = [], None, None
    for part in parts:
        name, args, kwargs = parse_call(part)
        if args and isinstance(args[0], int):
            bare = part
        # snapkv(0.3) is a budget; an int in front is the method's own first argument, as in kivi(4).
        if args and isinstance(args[0], float | str):
            budget = args.pop(0)
        budget = kwargs.pop("budget", budget)
        given = [repr(x) for x in args] + [f"{key}={value!r}" for key, value in kwargs.items()]
        plain.append(f"{name}({','.join(given)})" if given else name)
    method = textkv.resolve_method("+".join(plain), None if budget is None else Budget.parse(budget))
    # 40 may be meant as per cent, as tokens, or as the method's first argument, which without a budget changes nothing.
    if bare is not None and budget is None and method.budgeted:
        number = parse_call(bare)[1][0]
        mend = f"write a share as 0.4, tokens as '{number}t', or name that argument and give budget=0.4"
        raise ValueError(f"{bare!r} has no budget, and {number} in front is none; {mend}")
    return method
