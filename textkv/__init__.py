"""textkv: caches that keep less, for any rotary text or vision-language decoder of transformers.

from textkv import MethodCache
cache = MethodCache(model, "snapkv", budget=0.4)
model.generate(**inputs, past_key_values=cache)
"""

import kernels

if not hasattr(kernels, "OPERATIONS"):
    raise ImportError(
        f"`import kernels` found {kernels.__file__}, another package of that name, and not ours; put "
        "the folder of this project first on the path (run from it, or set PYTHONPATH to it)"
    )

import textkv.methods  # noqa: E402, F401  (registers every method)
from textkv.attention import release, use  # noqa: E402
from textkv.budgets import Budget  # noqa: E402
from textkv.cache import MethodCache  # noqa: E402
from textkv.context import AtRest  # noqa: E402
from textkv.conversation import Conversation  # noqa: E402
from textkv.evidence import Needs  # noqa: E402
from textkv.expression import split_list  # noqa: E402
from textkv.method import Capabilities, Method, list_methods, register, resolve_method  # noqa: E402
from textkv.report import CacheReport  # noqa: E402

__all__ = [
    "AtRest",
    "Budget",
    "CacheReport",
    "Capabilities",
    "Conversation",
    "Method",
    "MethodCache",
    "Needs",
    "list_methods",
    "register",
    "release",
    "resolve_method",
    "split_list",
    "use",
]
