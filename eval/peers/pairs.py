"""Which of our methods is which press of kvpress, with equal settings: kvpress's where they differ by default.

Of `h2o` both keep what all queries looked at most; ours keeps half of its budget for the latest tokens, as its paper
does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Pair:
    """One method on both sides.

    Attributes:
        ours: our method string.
        press: class in `kvpress`, "" = none: the full cache.
        settings: its arguments beside the ratio.
        wrapper: class around it, with its own arguments.
        eager: the press reads attention weights, which kvpress has from eager attention only.
    """

    ours: str
    press: str
    settings: dict[str, Any] = field(default_factory=dict)
    wrapper: str = ""
    around: dict[str, Any] = field(default_factory=dict)
    eager: bool = False

    def told(self) -> dict[str, Any]:
        """Plain values for the other side."""
        return dict(vars(self))


_SNAPKV = {"window_size": 64, "kernel_size": 5}
_EXPECTED = {"n_future_positions": 512, "n_sink": 4, "epsilon": 0.01}

FULL = "full"
PAIRS = {
    "snapkv": Pair("snapkv(window=64,kernel=5)", "SnapKVPress", _SNAPKV),
    "adakv": Pair(
        "snapkv(window=64,kernel=5)+adakv(floor=0.2,safeguard='protect')",
        "SnapKVPress",
        _SNAPKV,
        "AdaKVPress",
        {"alpha_safeguard": 0.2},
    ),
    "pyramidkv": Pair("pyramidkv(window=64,kernel=5,beta=20)", "PyramidKVPress", _SNAPKV | {"beta": 20}),
    "expected": Pair("expected(epsilon=0.01)", "ExpectedAttentionPress", _EXPECTED),
    "keydiff": Pair("keydiff", "KeyDiffPress"),
    "knorm": Pair("knorm", "KnormPress"),
    "tova": Pair("tova", "TOVAPress"),
    "streaming_llm": Pair("streaming_llm(positions='original')", "StreamingLLMPress", {"n_sink": 4}),
    "h2o": Pair("h2o", "ObservedAttentionPress", eager=True),
}
