"""What a cache method is: a frozen policy with six hooks, what it needs to see, and what it can promise.

A method never owns memory. It looks at a layer (its stored keys, the evidence it asked for) and tells the layer's
segments what to keep. Methods compose: in "snapkv+adakv" the second wraps the first (`inner`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

import torch

from textkv.budgets import Budget
from textkv.context import Context
from textkv.evidence import Evidence, Needs
from textkv.expression import construct, parse_call, split_parts
from textkv.layer import Layer
from textkv.registry import Registry


@dataclass(frozen=True)
class Capabilities:
    """What a method promises; checked when a cache is built and by `check_method`.

    Attributes:
        scores: gives an importance per token and KV head, so that wrappers can build on it.
        per_head: KV heads may keep different numbers of tokens.
        decode_eviction: drops tokens while decoding, not only at the end of the prompt.
        original_positions: keys keep the rotary phase of the position where they were seen.
        crop: tokens added since the last eviction can be taken back.
        stores_query_heads: stores one copy per QUERY head (the official GUI-KV), so bytes are larger by the group size.
        merges: changes the keys and values of tokens that it keeps (to stand for those it drops).
        lossy: stores keys and values at less than full precision, or shares them between layers.
        whole_heads: gives some KV heads all tokens in a dense segment of their own, which may be packed.
        retrieves: keeps tokens in host memory, and each decoded token sees some of them: the budget counts what it
            sees, not what is stored.
    """

    scores: bool = False
    per_head: bool = False
    decode_eviction: bool = False
    original_positions: bool = True
    crop: bool = True
    stores_query_heads: bool = False
    merges: bool = False
    lossy: bool = False
    whole_heads: bool = False
    retrieves: bool = False


@dataclass(frozen=True)
class Method:
    """Base of every method: hooks that do nothing, so that `full` is just this.

    Attributes:
        budget: what may be kept.
        inner: the method to the left of the `+` in a composition, or None.
    """

    budget: Budget = field(default=Budget(fraction=1.0), kw_only=True)
    inner: Method | None = field(default=None, kw_only=True)

    name: ClassVar[str] = ""
    capabilities: ClassVar[Capabilities] = Capabilities()
    wraps: ClassVar[Literal["scorer", "any"] | None] = None
    """What this method may stand behind a `+` of: a method that gives scores, any method whose kept tokens it can take
    over (its own `__post_init__` refuses those it cannot), or None = it stands alone."""

    heads_apart: ClassVar[bool] = False
    """Whether what a KV head keeps depends on nothing but that head: under tensor parallelism a device sees only its
    own heads, so that others would keep something else on each, in silence."""

    def __post_init__(self) -> None:
        # Whether two methods fit is known when they are written down: it is said then, and not at the end of a prompt.
        if self.inner is None:
            return
        if self.wraps is None:
            raise ValueError(f"{self.name} cannot follow {self.inner.name}+: it wraps no other method")
        if self.wraps == "scorer" and not self.inner.capabilities.scores:
            scorers = ", ".join(name for name in list_methods() if REGISTRY.find(name).capabilities.scores)
            raise ValueError(
                f"{self.inner.name}+{self.name}: {self.name} needs importance scores and {self.inner.name} gives none; "
                f"put a scorer before it: {scorers}"
            )
        if self.inner.capabilities.retrieves:
            raise ValueError(
                f"{self.inner.name}+{self.name}: {self.inner.name} keeps its tokens in host memory, where {self.name} "
                f"cannot take them over; put {self.name} before it or use it alone"
            )

    def needs(self) -> Needs:
        """Evidence that this method (and what it wraps) asks for."""
        return self.inner.needs() if self.inner else Needs()

    def on_build(self, context: Context) -> None:
        """A cache was built, for a model whose configuration is `context.config`: refuse what does not fit it.

        Raises:
            ValueError: in one line, with the mend.
        """
        if self.inner is not None:
            self.inner.on_build(context)

    def on_start(self, layer: Layer) -> None:
        """Before the first token of a layer: choose its segments."""

    def on_prefill_end(self, layer: Layer, evidence: Evidence) -> None:
        """A block of the prompt is in and its output computed with every key: drop, merge or move tokens."""

    def on_decode_begin(self, layer: Layer, query: torch.Tensor) -> None:
        """Before one decoded token attends; `query` is [batch, heads, 1, head_dim], post-RoPE."""

    def on_decode_end(self, layer: Layer, query: torch.Tensor) -> None:
        """After one decoded token has attended; it is stored, `query` is its own."""

    def on_evict(self, layer: Layer, kept: torch.Tensor) -> None:
        """Tokens have left a layer, whoever dropped them: this method, one that it wraps, or `MethodCache.forget`.
        Statistics that were set through `layer.statistics` have followed already.

        Args:
            kept: int32 [batch, stored heads, c] logical positions of what stayed, -1 = none.
        """
        if self.inner is not None:
            self.inner.on_evict(layer, kept)

    def on_finish(self, context: Context) -> None:
        """The last governed layer of a prompt block is done; `context.layers` are all of them."""

    @property
    def looks_across(self) -> bool:
        """Whether what a layer holds after a prompt block depends on what other layers hold, so that it is known only
        when the block is through all of them."""
        return type(self).on_finish is not Method.on_finish or (self.inner is not None and self.inner.looks_across)

    @property
    def evicts(self) -> bool:
        """Whether tokens are dropped; if not, every token seen stays stored, whatever the budget."""
        return True

    @property
    def counts_last(self) -> bool:
        """Whether the numbers that are kept per token (`Layer.statistic`) are of the last segment's tokens alone."""
        return self.inner is not None and self.inner.counts_last

    @property
    def remembers(self) -> bool:
        """Whether a step of an agent knows of those before it (`Layer.trajectory`): as the method on the left does."""
        return self.inner is not None and self.inner.remembers

    def check_sharded(self, shards: int) -> None:
        """Raises ValueError if the model's heads lie on several devices, and the method looks at all of them."""
        if shards > 1 and not self.heads_apart:
            raise ValueError(
                f"{self.name} compares heads, or counts on all of them being here, and {shards} devices share them "
                "under tensor parallelism; use a method that looks at each head alone, such as snapkv or h2o"
            )
        if self.inner is not None:
            self.inner.check_sharded(shards)

    @property
    def allowance(self) -> Budget:
        """How many tokens may stay: the budget, unless a method takes more of them that are smaller."""
        return self.budget

    @property
    def budgeted(self) -> bool:
        """Whether the budget changes anything; a method that only packs holds the same at any budget."""
        return self.evicts

    @property
    def expression(self) -> str:
        """The composition string that builds this method again (without the budget)."""
        defaults = {f.name: f.default for f in fields(self)}
        given = [
            f"{name}={value!r}"
            # Only what differs from the default: the string reads as its author would have written it.
            for name, value in ((f.name, getattr(self, f.name)) for f in fields(self))
            if name not in ("budget", "inner") and value != defaults[name]
        ]
        own = f"{self.name}({','.join(given)})" if given else self.name
        return f"{self.inner.expression}+{own}" if self.inner else own


REGISTRY = Registry("method", "agentkv.methods", "textkv.method.Method")
register = REGISTRY.register


def list_methods() -> list[str]:
    """Names of all registered methods, sorted."""
    return REGISTRY.names()


def resolve_method(expression: str | Method, budget: Budget | float | str | None = None) -> Method:
    """Builds a method from "name", "name(arg, key=value)" or "a+b(x)".

    Args:
        expression: composition string; each part wraps what stands left of it. A `Method` passes through.
        budget: given to every part; None keeps each part's default.

    Raises:
        ValueError: unknown name (with the nearest ones), malformed text, an impossible pair, a bad argument.
    """
    if isinstance(expression, Method):
        return expression
    method: Method | None = None
    for part in split_parts(expression):
        name, args, kwargs = parse_call(part)
        cls = REGISTRY.find(name)
        if "budget" in kwargs:
            raise ValueError(f"method {part!r}: a budget is given beside a method, not in its brackets")
        given = {} if budget is None else {"budget": Budget.parse(budget)}
        method = construct(cls, f"method {part!r}", args, kwargs, inner=method, **given)
    return method
