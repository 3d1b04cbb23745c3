"""Who votes for what: sums of attention count what the call's mask lets be seen, as the model itself counts it."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests.compare import mismatch
from tests.textkv import kinds
from tests.textkv.test_masks import additive, picture, prefix_gemma, vision_gemma
from tests.textkv.test_softmax import governed
from textkv import MethodCache, release
from textkv.evidence import Needs
from textkv.reading import NAME, Recorder

COLUMNS = Recorder(asked=Needs(columns=True))


@torch.no_grad()
def check_columns(model, plain: DynamicCache, cache: MethodCache, *calls: dict) -> None:
    """The last of the calls gives the columns that the model's own weights sum up to."""
    release(model)
    model.set_attn_implementation("eager")
    told = [model(**call, past_key_values=plain, output_attentions=True).attentions for call in calls][-1]
    cache.bind(model)
    for call in calls:
        model(**call, past_key_values=cache)
    for layer, weights in governed(cache, told):
        columns = weights.sum(2).unflatten(1, (layer.kv_heads, -1)).mean(2)
        assert not mismatch(layer.notes[NAME].columns, columns, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "sinks"])
@pytest.mark.parametrize("rows", [1, 2])
def test_columns_that_the_mask_hides_get_no_votes(kind, rows):
    model, ids = kinds.model_of_kind(kind), kinds.ids(60, rows)
    mask = torch.ones(rows, 60, dtype=torch.int64)
    mask[-1, 10:22] = 0
    at = torch.arange(60)[None].expand(rows, -1)
    first = {"input_ids": ids[:, :40], "position_ids": at[:, :40]}
    second = {"input_ids": ids[:, 40:], "position_ids": at[:, 40:], "attention_mask": mask}
    check_columns(model, DynamicCache(config=model.config), MethodCache(model, COLUMNS), first, second)


def test_columns_under_a_mask_of_the_callers_own():
    """Branches that do not see each other, and a passage that none of them sees."""
    model, ids = kinds.model_of_kind("dense"), kinds.ids(34)
    visible = torch.ones(1, 1, 4, 34, dtype=torch.bool)
    visible[..., 10:15] = False
    visible[..., 30:] = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
    at = torch.arange(30)[None]
    first = {"input_ids": ids[:, :30], "position_ids": at}
    second = {"input_ids": ids[:, 30:], "position_ids": at[:, :4] + 30, "attention_mask": additive(visible)}
    check_columns(model, DynamicCache(config=model.config), MethodCache(model, COLUMNS), first, second)


@pytest.mark.parametrize("text", [3, 20])
def test_columns_of_images_that_see_themselves_both_ways(text):
    model = vision_gemma()
    cache, plain = MethodCache(model, COLUMNS), DynamicCache(config=model.config.text_config)
    check_columns(model, plain, cache, picture(model, 1, text))


def test_columns_of_a_prefix_that_sees_itself_both_ways():
    model = prefix_gemma("gemma")
    ids, pixels = kinds.ids(20), torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    ids[0, :4] = 110
    call = {"input_ids": ids, "pixel_values": pixels, "token_type_ids": torch.tensor([[0] * 18 + [1] * 2])}
    cache, plain = MethodCache(model, COLUMNS), DynamicCache(config=model.config.text_config)
    check_columns(model, plain, cache, call)


@torch.no_grad()
def test_columns_of_a_padded_prefix_are_those_of_the_row_alone():
    model, ids = prefix_gemma("gemma"), kinds.ids(20, 2)
    mask, types = torch.ones(2, 20, dtype=torch.int64), torch.tensor([[0] * 18 + [1] * 2] * 2)
    mask[1, :5] = 0
    told = []
    for row, start in ((slice(0, 2), 0), (slice(1, 2), 5)):
        cache, given = MethodCache(model, COLUMNS), mask[row, start:]
        model(ids[row, start:], attention_mask=given, token_type_ids=types[row, start:], past_key_values=cache)
        told.append([layer.notes[NAME].columns[-1] for layer in cache.context.layers])
    for batch, alone in zip(*told, strict=True):
        assert not mismatch(batch[:, -15:], alone, atol=1e-4, rtol=1e-4) and not batch[:, :-15].any()


@pytest.mark.parametrize("method", ["h2o", "d2o", "critic", "h2o+mikv(16,2)"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_decoded_token_adds_nothing_to_what_is_hidden_from_it(method, rows):
    model, answers = kinds.model_of_kind("dense"), []
    cache, mask = MethodCache(model, method, 0.5), torch.ones(rows, 41, dtype=torch.int64)
    kinds.logits(model, kinds.ids(40, rows), cache)
    mask[-1, 20:38] = 0
    shown = cache.fork()
    for held, seen in ((cache, mask), (shown, torch.ones_like(mask))):
        before = sums(held)
        kinds.logits(model, kinds.ids(1, rows, seed=1), held, seen, position_ids=torch.tensor([[40]] * rows))
        after = sums(held)
        hidden = [slot for slot in after if slot in before and slot[2] == rows - 1 and 20 <= slot[4] < 38]
        assert hidden, "no hidden token is stored: nothing is tested"
        answers.append(all(after[slot] == pytest.approx(before[slot], abs=1e-6) for slot in hidden))
    assert answers == [True, False]


def sums(cache: MethodCache) -> dict[tuple, float]:
    """The sums of attention that a method keeps, by layer, name, row, head and position."""
    found = {}
    for layer in cache.context.layers:
        layer.tidy()
        at = layer._counted()
        for name in layer._of_tokens():
            if "entropy" in name:  # of the token's own row, not of what others gave it
                continue
            for row, heads in enumerate(layer.statistic(name).tolist()):
                for head, values in enumerate(heads):
                    for slot, x in enumerate(values):
                        found[layer.index, name, row, head, int(at[row, head, slot])] = x
    return found


WINDOWED = (
    "snapkv",
    "snapkv+adakv",
    "pyramidkv",
    "vatp",
    "tova",
    "cake(window=4)",
    "cake(window=4)+adakv",
    "kvcrush",
    "vl-cache",
    "rkv(window=4)",
    "snapkv+mikv(16,2)",
    "snapkv+minicache",
    "duo_attention(ranking='last_queries')",
)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("method", WINDOWED)
@torch.no_grad()
def test_a_passage_that_is_hidden_from_the_window_decides_nothing(method, rows):
    """What is kept of the others is what is kept where the passage was forgotten before."""
    model, ids = kinds.model_of_kind("dense"), kinds.ids(60, rows)
    mask, at = torch.ones(rows, 60, dtype=torch.int64), torch.arange(60)[None].expand(rows, -1)
    mask[:, 10:22] = 0
    kept, out = [], []
    for forget in (True, False):
        cache = MethodCache(model, method, "30t")
        cache.begin(tokens=60)  # nothing goes before the second part is there
        model(input_ids=ids[:, :40], position_ids=at[:, :40], past_key_values=cache)
        if forget:
            cache.forget([[(10, 22)]] * rows)
        told = {} if forget else {"attention_mask": mask}
        out.append(model(input_ids=ids[:, 40:], position_ids=at[:, 40:], past_key_values=cache, **told).logits)
        held = [layer.stored().positions for layer in cache.layers]
        kept.append([[sorted({*x.tolist()} - {-1, *range(10, 22)}) for x in of.flatten(0, 1)] for of in held])
    assert not mismatch(*out, atol=1e-4, rtol=0)
    assert kept[0] == kept[1]


@pytest.mark.parametrize("method", ["snapkv", "vatp", "pyramidkv", "cake(window=8)", "gui-kv", "st-lite", "star-kv"])
@torch.no_grad()
def test_a_row_of_fewer_tokens_than_the_window_has_only_these_for_its_own(method):
    """What is hidden from it lies just before them."""
    model, ids = kinds.model_of_kind("dense"), kinds.ids(60, 2)
    real, kept = torch.ones(2, 60, dtype=torch.int64), []
    real[1, 40:58] = 0
    for forget in (True, False):
        cache, mask = MethodCache(model, method, "30t"), real.clone()
        cache.freeze()
        model(input_ids=ids[:, :40], past_key_values=cache)
        cache.freeze(False)
        if forget:
            cache.forget([[(34, 38)]] * 2)
        else:
            mask[:, 34:38] = 0
        at = (real.cumsum(1) - 1)[:, 40:].clamp(min=0)
        model(input_ids=ids[:, 40:], attention_mask=mask, position_ids=at, past_key_values=cache)
        held = [layer.stored().positions for layer in cache.layers]
        kept.append([[sorted({*x.tolist()} - {-1, *range(34, 38)}) for x in of.flatten(0, 1)] for of in held])
    assert kept[0] == kept[1]


@torch.no_grad()
def test_a_passage_that_is_hidden_from_a_decoded_token_is_what_it_drops():
    model, ids = kinds.model_of_kind("dense"), kinds.ids(41)
    for method in ("cake(window=4)", "tova"):
        cache = MethodCache(model, method, 0.99)
        model(input_ids=ids[:, :40], past_key_values=cache)
        mask = torch.ones(1, 41, dtype=torch.int64)
        mask[:, 10:12] = 0
        before = {*cache.layers[0].stored().positions[0, 0].tolist()}
        model(input_ids=ids[:, 40:], attention_mask=mask, position_ids=torch.tensor([[40]]), past_key_values=cache)
        assert before - {*cache.layers[0].stored().positions[0, 0].tolist()} <= {10, 11}
