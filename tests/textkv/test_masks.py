"""What a mask says is obeyed: over columns of earlier turns, in later turns, in four dimensions, and both ways."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)

from tests.textkv import kinds
from textkv import MethodCache

EXACT = [
    ("full", None), ("snapkv", 1.0), ("adakv", 1.0), ("streaming_llm", 1.0), ("lacache", 1.0), ("h2o", 1.0),
    ("duo_attention", 1.0), ("tova", 1.0), ("kvcrush", 1.0),
    ("quest(dense=0,page=4)", 1.0),
]  # fmt: skip
"""Methods that drop nothing at these budgets, so that transformers' own cache tells what is right."""
VOTING = [
    "snapkv", "pyramidkv", "vatp", "cake", "kvcrush", "h2o", "tova", "d2o", "adakv", "streaming_llm", "lacache",
    "keydiff", "knorm", "expected", "h2o+adakv", "duo_attention", "tri_attention", "rkv",
    "quest(dense=0,page=4)", "sentence_kv(ends=(3,17,40,60,77))", "retrieval_attention(index='exact')",
]  # fmt: skip
KINDS = ["dense", "sliding", "sinks"]  # a hybrid's states know no mask over what they have read
CLOSE = 3e-4


def gap(ours, expected, where=None):
    """The largest difference of two answers, at the tokens `where` alone if given."""
    apart = (ours - expected).abs()
    return float((apart if where is None else apart[where]).max())


def plain_cache(model):
    return DynamicCache(config=model.config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "budget"), EXACT)
def test_a_row_that_ended_early_and_was_filled(kind, method, budget):
    """The fill was read as if it were text; from the next turn on the mask has zeros over it."""
    model = kinds.model_of_kind(kind)
    first, more, mask = kinds.ids(40, 2), kinds.ids(6, 2, seed=1), torch.ones(2, 40, dtype=torch.int64)
    ours, plain = MethodCache(model, method, budget), plain_cache(model)
    for held in (ours, plain):
        kinds.logits(model, first, held)
    mask[1, 31:] = 0
    both = []
    for held in (ours, plain):
        turn = torch.cat([mask, mask.new_ones(2, 4)], 1)
        both.append(
            torch.cat([kinds.logits(model, more[:, :4], held, turn), kinds.steps(model, more[:, 4:], held, turn)], 1)
        )
    assert gap(*both) < CLOSE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "budget"), EXACT)
def test_a_hidden_passage_can_be_shown_again(kind, method, budget):
    model = kinds.model_of_kind(kind)
    ours, plain = MethodCache(model, method, budget), plain_cache(model)
    hidden, shown = torch.ones(1, 33, dtype=torch.int64), torch.ones(1, 34, dtype=torch.int64)
    hidden[0, 22:28] = 0
    more = kinds.ids(2, seed=1)
    for held in (ours, plain):
        kinds.logits(model, kinds.ids(32), held)
    at = torch.tensor([[32]])
    for mask, i in ((hidden, 0), (shown, 1)):
        both = [kinds.logits(model, more[:, i : i + 1], x, mask, position_ids=at + i) for x in (ours, plain)]
        assert gap(*both) < CLOSE


@pytest.mark.parametrize(
    "method",
    ["snapkv", "adakv", "kivi(2)", "snapkv+mikv(16,2)", "minicache", "duo_attention", "turboquant(3)",
     "adakv+turboquant(4)"],
)  # fmt: skip
@pytest.mark.parametrize("passage", [(0, 8), (14, 22), (37, 45)])
def test_hidden_tokens_have_no_say_in_any_segment(method, passage):
    """Where tokens are dropped or packed, no plain cache tells: but what is hidden must not change the answer."""
    model = kinds.model_of_kind("dense")
    mask = torch.ones(1, 81, dtype=torch.int64)
    mask[0, slice(*passage)] = 0
    held = MethodCache(model, method, None if method in ("kivi(2)", "minicache", "turboquant(3)") else 0.5)
    kinds.logits(model, kinds.ids(80), held)
    other = held.fork()
    visible = kinds.logits(model, kinds.ids(1, seed=1), held.fork(), torch.ones(1, 81, dtype=torch.int64))
    expected = kinds.logits(model, kinds.ids(1, seed=1), held, mask)
    # The same again, with the hidden tokens' keys and values spoilt where a tensor of them lies open.
    spoilt = 0
    for layer in other.context.layers:
        for segment in layer.segments:
            if hasattr(segment, "_valid"):
                at = segment.held_positions()
                gone = (at >= passage[0]) & (at < passage[1])
                segment._k()[gone], segment._v()[gone] = 50.0, 50.0
                spoilt += int(gone.sum())
    assert gap(kinds.logits(model, kinds.ids(1, seed=1), other, mask), expected) < CLOSE
    if spoilt:
        assert float((visible - expected).abs().max()) > 1e-3, "the passage does not matter: the test tells nothing"


def turns_of(pad: int):
    """Two rows that say as much in the first turn; in the second, row 1 says less and is padded with `pad`."""
    first, second = kinds.ids(50, 2), kinds.ids(24, 2, seed=1)
    mask = torch.ones(2, 74, dtype=torch.int64)
    mask[1, 50:61] = 0
    second[1, :11] = pad
    return first, second, mask


@pytest.mark.parametrize("budget", [0.4, "40t"])
@pytest.mark.parametrize("method", VOTING)
def test_padding_of_a_later_turn_never_votes(method, budget):
    model, kept, answers = kinds.model_of_kind("dense"), [], []
    for pad in (0, 7):
        first, second, mask = turns_of(pad)
        held = MethodCache(model, method, budget)
        kinds.logits(model, first, held)
        kinds.logits(model, second, held, mask)
        kept.append(held.at_rest.kept)
        answers.append(kinds.steps(model, kinds.ids(3, 2, seed=2), held, mask))
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
    assert gap(*answers) < CLOSE
    for row, start in ((0, 0), (1, 11)):
        alone, one = MethodCache(model, method, budget), slice(row, row + 1)
        kinds.logits(model, first[one], alone)
        kinds.logits(model, second[one, start:], alone)
        assert gap(answers[1][one], kinds.steps(model, kinds.ids(3, 2, seed=2)[one], alone)) < CLOSE


@pytest.mark.parametrize("method", VOTING)
def test_a_row_that_gets_nothing_in_a_turn(method):
    """A batch of conversations goes on although one of them has nothing to say in this turn: it keeps what it had."""
    model = kinds.model_of_kind("dense")
    first, second, third = kinds.ids(50, 2), kinds.ids(20, 2, seed=1), kinds.ids(3, 2, seed=2)
    mask = torch.ones(2, 70, dtype=torch.int64)
    mask[1, 50:] = 0
    held = MethodCache(model, method, 0.4)
    kinds.logits(model, first, held)
    kinds.logits(model, second, held, mask)
    answers = kinds.steps(model, third, held, mask)
    assert bool(answers.isfinite().all())
    for row in (0, 1):
        alone, one = MethodCache(model, method, 0.4), slice(row, row + 1)
        kinds.logits(model, first[one], alone)
        if row == 0:
            kinds.logits(model, second[one], alone)
        assert gap(answers[one], kinds.steps(model, third[one], alone)) < CLOSE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", VOTING)
def test_a_decode_step_in_which_one_row_is_padded(kind, method):
    """A row that has ended waits, filled with padding, while the other goes on."""
    model = kinds.model_of_kind(kind)
    mask = torch.ones(2, 40, dtype=torch.int64)
    held, out = MethodCache(model, method, 0.5), []
    kinds.logits(model, kinds.ids(40, 2), held)
    new = kinds.ids(5, 2, seed=1)
    for i in range(5):
        mask = torch.cat([mask, torch.tensor([[1], [int(i not in (1, 2))]])], 1)
        out.append(kinds.logits(model, new[:, i : i + 1], held, mask))
    out = torch.cat(out, 1)
    for row, columns in ((0, [0, 1, 2, 3, 4]), (1, [0, 3, 4])):
        alone, one = MethodCache(model, method, 0.5), slice(row, row + 1)
        kinds.logits(model, kinds.ids(40, 2)[one], alone)
        assert gap(out[one][:, columns], kinds.steps(model, new[one][:, columns], alone)) < CLOSE


def additive(visible: torch.Tensor) -> torch.Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("kind", ["dense", "sinks"])
@pytest.mark.parametrize(("method", "budget"), EXACT)
@pytest.mark.parametrize("dtype", ["bool", "float"])
def test_a_mask_of_the_callers_own(kind, method, budget, dtype):
    """A tree of drafts after a prompt: each branch sees itself and the prompt, but for one passage."""
    model = kinds.model_of_kind(kind)
    new = kinds.ids(4, seed=1)
    visible = torch.ones(1, 1, 4, 34, dtype=torch.bool)
    visible[..., 10:15] = False
    visible[..., 30:] = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
    both, at = [], torch.tensor([[30, 31, 31, 32]])
    for held in (MethodCache(model, method, budget), plain_cache(model)):
        kinds.logits(model, kinds.ids(30), held)
        given = additive(visible) if dtype == "float" or isinstance(held, DynamicCache) else visible
        if kind == "sinks":  # layers of two kinds take a mask each, one of them as narrow as its window
            given = {"full_attention": given, "sliding_attention": given[..., -11:]}
        both.append(kinds.logits(model, new, held, attention_mask=given, position_ids=at))
    assert gap(*both) < CLOSE


@pytest.mark.parametrize("kind", ["sliding", "sinks"])
def test_a_mask_of_the_callers_own_says_what_a_window_hides(kind):
    """As transformers takes it: in a first forward, and as long as the window has let go of nothing. Where it has, a
    mask of all columns is narrowed to the window, which transformers cannot take at all."""
    model, new, shown = kinds.model_of_kind(kind), kinds.ids(20), torch.ones(20, 20, dtype=torch.bool).tril()
    shown[9, 5:8] = False
    plain = [logits_of(model, plain_cache(model), new, cut, shown) for cut in ((20,), (5, 15), (1, 3, 16))]
    ours = [logits_of(model, MethodCache(model, "full"), new, cut, shown) for cut in ((20,), (5, 15), (1, 3, 16))]
    assert max(gap(x, y) for x, y in zip(ours, plain, strict=True)) < CLOSE
    assert gap(plain[0], kinds.logits(model, new, plain_cache(model))) > 1e-2  # it is another model without its window
    held = MethodCache(model, "full")
    kinds.logits(model, new, held)
    all_columns = additive(torch.ones(1, 1, 1, 21, dtype=torch.bool))
    found = kinds.logits(model, new[:, :1], held, attention_mask=all_columns, position_ids=torch.tensor([[20]]))
    held = plain_cache(model)
    kinds.logits(model, new, held)
    assert gap(found, kinds.logits(model, new[:, :1], held)) < CLOSE


def logits_of(model, held, new: torch.Tensor, cut: tuple[int, ...], shown: torch.Tensor) -> torch.Tensor:
    """Logits of all tokens, fed in pieces of the sizes `cut` with the caller's mask `shown` of all of them."""
    out, first = [], 0
    for part in new.split(cut, 1):
        stop = first + part.shape[1]
        mask, at = additive(shown[None, None, first:stop, :stop]), torch.arange(first, stop)[None]
        out.append(kinds.logits(model, part, held, attention_mask=mask, position_ids=at))
        first = stop
    return torch.cat(out, 1)


def test_a_mask_that_hides_from_some_queries_only_is_refused():
    model = kinds.model_of_kind("dense")
    held = MethodCache(model, "full")
    kinds.logits(model, kinds.ids(30), held)
    visible = torch.ones(1, 1, 2, 32, dtype=torch.bool).tril(30)
    visible[0, 0, 0, 4] = False
    with pytest.raises(ValueError, match="see different tokens"):
        kinds.logits(model, kinds.ids(2), held, attention_mask=visible)


@cache
def vision_gemma():
    """Gemma 3 with a tiny vision tower: the four tokens of an image see each other both ways."""
    torch.manual_seed(0)
    text = dict(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=8, query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"] * 2, max_position_embeddings=512,
    )  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7
    )
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=95, image_token_index=95,
        boi_token_index=93, eoi_token_index=94, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model" in name and ("q_proj.weight" in name or "k_proj.weight" in name):
                weight.mul_(4)
    return model


def picture(model, seed: int, text: int):
    """ids [1, text + 6 + 3] with one image, its pixels, and which tokens are the image's."""
    image = model.config.image_token_id
    ids = torch.cat(
        [kinds.ids(text, seed=seed), torch.tensor([[93] + [image] * 4 + [94]]), kinds.ids(3, seed=seed + 9)], 1
    )
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == image).long()}


@torch.no_grad()
@pytest.mark.parametrize(("method", "budget"), EXACT)
@pytest.mark.parametrize("text", [3, 20])
def test_images_that_see_themselves_both_ways(method, budget, text):
    model = vision_gemma()
    first, second = picture(model, 1, text), picture(model, 2, 5)
    ours, plain, both = MethodCache(model, method, budget), DynamicCache(config=model.config.text_config), []
    for held in (plain, ours):
        out = [model(**first, past_key_values=held).logits]
        causal = model(**(first | {"token_type_ids": torch.zeros_like(first["token_type_ids"])})).logits
        assert float((out[0] - causal).abs().max()) > 1e-2, "both ways or not makes no difference: nothing is tested"
        out += [
            model(kinds.ids(1, seed=i), past_key_values=held, token_type_ids=torch.zeros(1, 1).long()).logits
            for i in (3, 4)
        ]
        out.append(model(**second, past_key_values=held).logits)
        both.append(torch.cat(out, 1))
    assert gap(*both) < CLOSE


@cache
def prefix_gemma(model_type: str):
    """PaliGemma, with or without windows: a prompt's tokens of type 0 see each other both ways, later ones do not."""
    torch.manual_seed(0)
    text = dict(
        model_type=model_type, vocab_size=120, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, pad_token_id=0,
    )  # fmt: skip
    text |= {"sliding_window": 8, "query_pre_attn_scalar": 16} if model_type == "gemma2" else {}
    vision = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=64, vision_use_head=False,
    )  # fmt: skip
    config = PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=110, projection_dim=64, hidden_size=64,
        attn_implementation="eager",
    )  # fmt: skip
    model = PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model" in name and ("q_proj.weight" in name or "k_proj.weight" in name):
                weight.mul_(6)
    return model


@torch.no_grad()
@pytest.mark.parametrize(("method", "budget"), EXACT)
@pytest.mark.parametrize("model_type", ["gemma", "gemma2"])
def test_a_prefix_that_sees_itself_both_ways(method, budget, model_type):
    model = prefix_gemma(model_type)
    ids, pixels = kinds.ids(30), torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    ids[0, :4] = 110
    ours, plain, both = MethodCache(model, method, budget), DynamicCache(config=model.config.text_config), []
    assert not ours.is_initialized
    for held in (plain, ours):
        types = torch.tensor([[0] * 18 + [1] * 2])
        out = [model(ids[:, :20], pixel_values=pixels, token_type_ids=types, past_key_values=held).logits]
        causal = model(ids[:, :20], pixel_values=pixels, token_type_ids=torch.ones_like(types)).logits
        assert float((out[0] - causal).abs().max()) > 1e-2, "both ways or not makes no difference: nothing is tested"
        # A later turn is no prefix: models ask the cache whether it is the first one.
        for cut in (slice(20, 26), slice(26, 27), slice(27, 30)):
            of_turn = torch.zeros_like(ids[:, cut])
            out.append(model(ids[:, cut], token_type_ids=of_turn, past_key_values=held).logits)
        both.append(torch.cat(out, 1))
        assert held.is_initialized
    assert gap(*both) < CLOSE
    ours.reset()
    assert not ours.is_initialized


def test_a_decoder_that_attends_both_ways_by_itself_is_refused():
    with pytest.raises(ValueError, match="layer 0 attends in both directions"):
        MethodCache(prefix_gemma("gemma").model.language_model)


@pytest.mark.parametrize("method", ["h2o", "d2o", "h2o+mikv(16,2)"])
def test_padding_adds_nothing_to_sums_of_attention(method):
    model, sums = kinds.model_of_kind("dense"), []
    for pad in (0, 7):
        held = MethodCache(model, method, 0.5)
        kinds.logits(model, kinds.ids(40, 2), held)
        mask = torch.ones(2, 41, dtype=torch.int64)
        mask[1, 40] = 0
        before = [{name: x.clone() for name, x in layer.statistics.items()} for layer in held.context.layers]
        kinds.logits(model, torch.tensor([[5], [pad]]), held, mask)
        sums.append([{name: x[1] for name, x in layer.statistics.items()} for layer in held.context.layers])
    assert before[0], "the method keeps no sums: nothing is tested"
    for one, other in zip(*sums, strict=True):
        assert all(torch.equal(one[name].nan_to_num(), other[name].nan_to_num()) for name in one)


@pytest.mark.parametrize("method", ["full", "snapkv", "h2o", "streaming_llm"])
@pytest.mark.parametrize("kind", list(kinds.KINDS))
def test_hidden_columns_beside_windows_states_and_sinks(kind, method):
    """A passage hidden in a later turn and shown again, in a padded batch: as transformers' own cache does it."""
    model, ids = kinds.model_of_kind(kind), kinds.ids(60, 2)
    ours, plain = MethodCache(model, method, 1.0), DynamicCache(config=model.config)
    tokens = torch.ones(2, 60, dtype=torch.int64)
    tokens[0, :5] = 0
    for start, stop, hides in ((0, 40, 0), (40, 41, 0), (41, 42, 0), (42, 55, 1), (55, 56, 1), (56, 60, 0)):
        mask = tokens[:, :stop].clone()
        mask[1, 10 : 10 + 10 * hides] = 0
        at = (tokens[:, :stop].cumsum(1) - 1).clamp(min=0)[:, start:]
        got, expected = (
            kinds.logits(model, ids[:, start:stop], cache, mask, position_ids=at) for cache in (ours, plain)
        )
        real = mask[:, start:].bool()
        assert (got - expected)[real].abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["dense", "sliding"])
def test_a_mask_of_whole_numbers_is_one_clear_error(kind):
    model = kinds.model_of_kind(kind)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.long).tril()
    with pytest.raises(ValueError, match="is torch.int64: give bool, True = may be seen, or floats"):
        model(kinds.ids(8), attention_mask=mask, past_key_values=MethodCache(model, "full"))
