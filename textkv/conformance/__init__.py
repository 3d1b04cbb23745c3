"""`check_method`: what every cache method must hold, ours or a third party's, checked on a small model in seconds.

    from textkv.conformance import check_method
    for check in check_method("snapkv+adakv"):
        print(check)

Each check compares whole-model logits in fp32. "Equals masked full attention" is the strongest: after any eviction,
decoding must give what exact attention gives when the dropped tokens are masked, per layer and head.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from textkv.attention import use
from textkv.budgets import Budget
from textkv.conformance.bench import Bench, NotApplicable, small_llama
from textkv.conformance.checks import CHECKS
from textkv.conformance.oracle import MASKED, masked_attention

__all__ = ["CHECKS", "MASKED", "Bench", "Check", "NotApplicable", "check_method", "masked_attention"]


@dataclass(frozen=True)
class Check:
    """Outcome of one check: "passed", or "not applicable" with the capability that says so in `note`."""

    name: str
    outcome: str
    note: str = ""


def check_method(method: str, budget: Budget | float | str = 0.4, model: PreTrainedModel | None = None) -> list[Check]:
    """Runs every check on `method` (a composition string).

    Args:
        budget: used where a check needs eviction to happen.
        model: a text model in fp32 with grouped heads; None builds a small random Llama.

    Returns:
        One `Check` per check, all passed or not applicable.

    Raises:
        AssertionError: names every check that failed, and why.
    """
    bench = Bench(method, budget, model or small_llama())
    before = bench.model.config._attn_implementation
    results, failures = [], []
    for name, check in CHECKS.items():
        # Whatever the check before has put on the model: an oracle of one is no implementation for the next.
        bench.model.set_attn_implementation(before)
        use(bench.model)
        try:
            check(bench)
            results.append(Check(name, "passed"))
        except NotApplicable as reason:
            results.append(Check(name, "not applicable", str(reason)))
        except Exception as error:  # whatever a method raises is its failure, and all checks shall be told
            failures.append(f"{name}: {type(error).__name__}: {error}")
    bench.model.set_attn_implementation(before)
    if failures:
        raise AssertionError(f"{method} at budget {budget} fails " + "; ".join(failures))
    return results
