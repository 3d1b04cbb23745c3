"""textkv: caches that keep less, for any rotary text or vision-language decoder of transformers.

from textkv import MethodCache

cache = MethodCache(model, "snapkv", budget=0.4)
model.generate(**inputs, past_key_values=cache)
"""

import textkv._start  # noqa: F401  (first: it hears what the imports below raise)
import textkv.methods  # noqa: F401  (registers every method)
from textkv.attention import release, use
from textkv.budgets import Budget
from textkv.cache import MethodCache
from textkv.context import AtRest
from textkv.conversation import Conversation
from textkv.evidence import Needs
from textkv.expression import split_list
from textkv.method import Capabilities, Method, list_methods, register, resolve_method
from textkv.report import CacheReport

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
