"""The biased model answers as the one it was made of, and what 4 bits leave of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agentkv.eval.biased import EVERY_LAYER, NORMS, PLACEMENTS, biased_mini
from agentkv.eval.textbench import continuation, examples, text_rows
from tests.textkv.methods.test_kivi import PerToken
from textkv import MethodCache, use
from textkv.mini import load_mini

N, LENGTH = 8, 256  # examples of each of two tasks


@pytest.fixture(scope="module")
def small():
    return load_mini()


@pytest.fixture(scope="module", params=PLACEMENTS)
def biased(request):
    return request.param, biased_mini(request.param, EVERY_LAYER)[0]


@pytest.fixture(scope="module")
def asked(small):
    return [examples(small[1], task, LENGTH, N) for task in ("needle", "copy")]


@torch.inference_mode()
def right(model, method, asked, budget=1.0) -> int:
    """How many answers are right in every token."""
    use(model)
    found = 0
    for part in asked:
        prompts = torch.from_numpy(np.stack([e.prompt_ids for e in part]))
        wanted = torch.from_numpy(np.stack([e.answer_ids for e in part]))
        length = {"max_new_tokens": wanted.shape[1], "min_new_tokens": wanted.shape[1], "do_sample": False}
        cache = MethodCache(model, method, budget)
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), past_key_values=cache, **length)
        found += int((out[:, prompts.shape[1] :] == wanted).all(1).sum())
    return found


@torch.inference_mode()
def greedy(model, method, row: torch.Tensor, steps: int) -> list[int]:
    use(model)
    cache, last, out = MethodCache(model, method), row[None], []
    for _ in range(steps):
        last = model(last, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        out.append(int(last))
    return out


def test_a_bias_of_the_given_norms_changes_no_logit(small):
    rows = text_rows(small[1], None, 2, 200)
    with torch.inference_mode():
        true = small[0](rows).logits
        for placement in PLACEMENTS:
            model, _ = biased_mini(placement)
            norms = [float(layer.self_attn.k_proj.bias.norm()) for layer in model.model.layers]
            assert norms == pytest.approx([NORMS[0], NORMS[1], NORMS[1], NORMS[2]])
            torch.testing.assert_close(model(rows).logits, true, rtol=1e-3, atol=2e-3)


def test_four_bits_keep_what_the_full_cache_recalls(biased, asked):
    placement, model = biased
    full = right(model, "full", asked)
    assert full >= 0.8 * 2 * N  # all 16; here and below two answers or more may fall as another processor rounds
    for method in ("kivi(4)", "gear(4)"):
        assert right(model, method, asked) >= 0.85 * full, (placement, method)
    assert right(model, PerToken(4), asked) <= 0.5 * full  # a scale per token loses the tokens in the bias
    if placement in ("slow", "beside"):  # constant or aside: mikv's own centre takes it away
        assert right(model, "mikv(16,4)", asked, 0.2) >= 0.85 * full
    if placement in ("even", "fast"):
        assert right(model, "kivi(4,centre='fixed')", asked) < 0.7 * full


@pytest.fixture(scope="module")
def sure(small):
    """Texts that come three times, and their next 32 tokens: those which 4 bits do not change without any bias."""
    rows = [torch.cat([text, text[1:], text[1:], text[1:30]]) for text in text_rows(small[1], None, 6, 90)]
    said = [greedy(small[0], "full", row, 32) for row in rows]
    pairs = zip(rows, said, strict=True)
    return [(row, full) for row, full in pairs if greedy(small[0], "kivi(4)", row, 32) == full][:3]


def test_four_bits_say_the_same_tokens(biased, sure):
    placement, model = biased
    worse = [PerToken(4)] + ["kivi(4,centre='fixed')"] * (placement in ("even", "fast"))

    def same(method) -> int:
        return sum(greedy(model, method, row, 32) == said for row, said in sure)

    assert len(sure) > 0  # near ties may fall either way
    assert same("full") >= len(sure) / 2 and same("kivi(4)") >= len(sure) / 2
    assert [same(method) for method in worse] == [0] * len(worse)


def test_a_turned_centre_leaves_the_error_of_a_model_without_bias(biased, small):
    placement, model = biased
    rows = text_rows(small[1], None, 2, 320)

    def error(of, method):
        return continuation(of, method, "1.0", rows, 256).error(continuation(of, "full", "1.0", rows, 256))

    unbiased, ours = error(small[0], "kivi(4)"), error(model, "kivi(4)")
    assert ours < 1.3 * unbiased, (placement, ours, unbiased)
    if placement in ("even", "fast"):
        assert error(model, "kivi(4,centre='fixed')") > 3 * ours


def test_an_unknown_placement_is_refused():
    with pytest.raises(ValueError, match="placement='middle' is not known; use one of even, slow, fast, beside"):
        biased_mini("middle")
