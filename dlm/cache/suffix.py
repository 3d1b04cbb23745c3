"""Suffix pruning (Streaming-dLLM, arXiv 2601.17917): masks far behind the active block are neither computed nor seen.

What stays is everything up to the block's end, the next `window` slots, and the last slot of the canvas with its own
position, which tells the model how long the answer is. Goes with every cache of windows: "dual+suffix(32)". The authors
count the window in tokens in their code and in blocks in their formula; here it is tokens, as in the code. Text that
was given behind a gap is never pruned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dlm.cache.base import Policy, Run
from dlm.canvas import Canvas
from dlm.models.decoding_spec import DecodingSpec


@dataclass(frozen=True)
class Suffix(Policy):
    """A policy on a pruned canvas; with a window of G or more it is the policy itself.

    Attributes:
        policy: what is computed of the slots that are left.
        window: slots behind the active block that are left (the authors: 32 to 192).

    Raises:
        ValueError: a window below 0, or a policy that always computes the whole canvas.
    """

    policy: Policy
    window: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 0:
            raise ValueError(f"suffix window={self.window!r} is no number of tokens; use 0 or more, for example 32")
        if not self.policy.prunes:
            raise ValueError(self._refusal())

    def _refusal(self) -> str:
        return (
            f"{self.expression}: {self.policy.name} computes whole rows here and cannot leave slots out; use dual, "
            "prefix, freecache, dkv, or a model with our attention"
        )

    def check(self, spec: DecodingSpec) -> None:
        """As the policy."""
        self.policy.check(spec)

    @property
    def name(self) -> str:
        """The policy's name and the modifier's."""
        return f"{self.policy.name}+suffix"

    @property
    def expression(self) -> str:
        """The composition string, as "dual+suffix(32)"."""
        return f"{self.policy.expression}+suffix({self.window})"

    @property
    def still(self) -> bool:
        """As the policy: what is left changes with the block alone."""
        return self.policy.still

    @property
    def whole_blocks(self) -> bool:
        """As the policy."""
        return self.policy.whole_blocks

    def begin(self, canvas: Canvas, model: Any) -> Run:
        """The policy's run, on what is left.

        Raises:
            ValueError: a model that cannot leave slots out.
        """
        run = self.policy.begin(canvas, model)
        if run.cache is None:
            raise ValueError(self._refusal())
        run.suffix = self.window
        return run
