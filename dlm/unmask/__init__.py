"""Unmasking rules for diffusion language models: which masks become text now, and with which token.

"confidence", "random" (LLaDA), "origin", "maskgit_plus", "topk_margin", "entropy(compat=True)" (Dream),
"threshold(0.9)", "factor(1.0)" (Fast-dLLM), "entropy_bound(0.1)" (diffusers), "hierarchical(0.9, low=0.4)" (dInfer),
"klass(0.9, 0.01)" (KLASS), "edit(0.7, 0.5)" (LLaDA2.1: written tokens may be replaced), "wino(0.6, 0.9)" (they
may become masks again), "ssd(4)" (the tokens of "confidence" in fewer forwards),
"guided('topk', k=2)" (a causal model says how far a draft may be kept).
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from dlm.unmask.base import REGISTRY, Choice, Rule, Unmasker, find, register
from dlm.unmask.confidence import Confidence, Random
from dlm.unmask.dream import Entropy, MaskGitPlus, Origin, TopKMargin
from dlm.unmask.edit import TokenEditing
from dlm.unmask.guided import Guided
from dlm.unmask.guider import Guider
from dlm.unmask.klass import KLASS
from dlm.unmask.parallel import EntropyBound, Factor, Hierarchical, Threshold
from dlm.unmask.sampling import Sampling
from dlm.unmask.ssd import SSD
from dlm.unmask.wino import WINO
from textkv.expression import construct, parse_call, split_parts

__all__ = [
    "KLASS",
    "SSD",
    "WINO",
    "Choice",
    "Confidence",
    "Entropy",
    "EntropyBound",
    "Factor",
    "Guided",
    "Guider",
    "Hierarchical",
    "MaskGitPlus",
    "Origin",
    "Random",
    "Rule",
    "Sampling",
    "Threshold",
    "TokenEditing",
    "TopKMargin",
    "Unmasker",
    "list_rules",
    "parse_rule",
    "register",
    "resolve_unmask",
]


def is_rule(name: str) -> bool:
    """Whether a name, or "package.module:Class", is that of an unmasking rule."""
    try:
        return bool(find(name))
    except ValueError:
        return False


def list_rules() -> list[str]:
    """Names of all registered rules, sorted."""
    return REGISTRY.names()


def resolve_unmask(
    expression: str | Rule, sampling: Sampling | None = None, guide: Guider | PreTrainedModel | None = None
) -> Rule:
    """Builds a rule from "name" or "name(x, key=y)".

    Args:
        expression: a `Rule` is taken as it is.
        sampling: how tokens are drawn; None = as the rule has it.
        guide: of a guided rule; a bare model has the same ids as the diffusion model; None = as the rule has it.

    Raises:
        ValueError: unknown name (with the nearest ones), malformed text, a bad argument, a guide for a rule that takes
            none, or none for one that needs it.
    """
    rule = expression if isinstance(expression, Rule) else parse_rule(expression)
    if sampling is not None:
        rule = replace(rule, sampling=sampling)
    # Without tokenizers a Guider takes the ids to mean the same to both models.
    if isinstance(guide, PreTrainedModel):
        guide = Guider(guide)
    if guide is not None and not isinstance(guide, Guider):
        raise ValueError(f"guide={guide!r} is no model; give a causal language model, or a Guider around one")
    if isinstance(rule, Guided):
        rule = replace(rule, guide=guide or rule.guide)
        if rule.guide is None:
            raise ValueError("the rule guided needs a guide: a Guider around a causal language model")
    elif guide is not None:
        raise ValueError(f"the rule {rule.name} takes no guide; use guided, or leave the guide out")
    return rule


def parse_rule(expression: str) -> Rule:
    """The rule of an expression, with default sampling and no guide yet.

    Raises:
        ValueError: unknown name, malformed text, a bad argument.
    """
    if not isinstance(expression, str):
        raise ValueError(f"unmask={expression!r} is neither a text nor a Rule; write for example 'confidence'")
    part, *more = split_parts(expression)
    if more:
        raise ValueError(f"unmasking rule {expression!r}: a rule stands alone; leave out +{'+'.join(more)}")
    name, args, kwargs = parse_call(part)
    return construct(find(name), f"unmasking rule {part!r}", args, kwargs)
