"""FLOPs of a decoded token: the paper's figure by formula, and the formula against PyTorch's count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import MixtralConfig, Qwen2_5_VLConfig

from agentkv.eval.agentnetbench.flops import QWEN_7B, Shape, built, counted, main, spans_of

SMALL = replace(QWEN_7B, layers=2, hidden=96, heads=6, kv_heads=2, head_dim=16, mlp=160, vocabulary=64)


def test_the_papers_figure() -> None:
    attention = [QWEN_7B.attention(n) / 28 for n in (0, 1)]
    assert attention[0] == pytest.approx(58.7e6, rel=1e-3) and attention[1] - attention[0] == 14336
    for tokens, cut in ((7500, 0.388), (7551, 0.389)):
        assert 1 - QWEN_7B.attention(0.4 * tokens) / QWEN_7B.attention(tokens) == pytest.approx(cut, abs=5e-4)
    assert 1 - QWEN_7B.model(3000) / QWEN_7B.model(7500) == pytest.approx(0.105, abs=5e-4)
    assert QWEN_7B.model(0) == pytest.approx(14.14e9, rel=1e-3)


@pytest.mark.parametrize(("method", "budget", "stored"), [("full", "1.0", 300), ("gui-kv", "0.4", 120)])
def test_the_formula_is_what_is_counted(method: str, budget: str, stored: int) -> None:
    seen = counted(built(SMALL, torch.float32), method, budget, 300, spans_of(300, 5, 40))
    assert seen == {"attention": SMALL.attention(stored + 1), "model": SMALL.model(stored + 1), "tokens": stored}


def test_shapes_come_from_configurations() -> None:
    text = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 28}
    config = Qwen2_5_VLConfig(text_config=text | {"intermediate_size": 18944, "vocab_size": 152064})
    assert Shape.of(config) == QWEN_7B
    assert Shape.of(MixtralConfig()) is None, "experts are another sum"


def test_screenshots_lie_apart() -> None:
    assert spans_of(100, 2, 40) == [(6, 46), (52, 92)]
    with pytest.raises(ValueError, match="hold no 3 screenshots"):
        spans_of(100, 3, 40)


def test_bad_requests_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--layers", "0"], ["--tokens", "100"], ["--budget", "40"], ["--method", "gui-kw"]):
        assert main(options) == 2 and capsys.readouterr().err.count("\n") == 1
