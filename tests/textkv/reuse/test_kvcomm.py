"""Prompts put together of what others have read: exact where they must be, dense where nothing fits."""

from __future__ import annotations

import pytest
import torch

from textkv import MethodCache
from textkv.mini import load_mini
from textkv.reuse.kvcomm import Criteria, Dense, KVComm, Prefix, PromptTemplate, Recompute, Segment
from textkv.reuse.kvcomm.template import ids_of

TEMPLATE = "the code of the list is {first} question : {second} ."
LONG = "the old king of the river is a friend of the baker"
SHORT = "the happy child is in the garden"
LONGER = f"{LONG} and {SHORT} near the old market"
ASKED = "the code of the falcon is"


@pytest.fixture(scope="module")
def mini():
    model, tokenizer = load_mini()
    model.generation_config.eos_token_id = None  # an answer has as many tokens as it may
    return model, tokenizer


def told(engine: Dense, first: str, second: str = ASKED):
    return engine.call("ann", {"first": engine.segment(first), "second": engine.segment(second)})


def made(kind, mini, **how) -> Dense:
    engine = kind(*mini, 4, **how)
    engine.add("ann", TEMPLATE)
    return engine


@torch.inference_mode()
def read(engine: Dense, first: str, second: str = ASKED):
    """(reading, parts) of a prompt, without an answer."""
    given = {"first": engine.segment(first), "second": engine.segment(second)}
    parts = engine.templates["ann"].parts({name: x.ids for name, x in given.items()})
    return engine._read("ann", parts, given), parts


def assert_same_cache(
    ours: MethodCache, truth: MethodCache, layers: slice = slice(None), upto: int | None = None
) -> None:
    for a, b in zip(ours.layers[layers], truth.layers[layers], strict=True):
        for name in ("keys", "values"):
            x, y = (getattr(layer.stored(), name)[:, :, :upto] for layer in (a, b))
            torch.testing.assert_close(x, y, atol=2e-4, rtol=1e-3)


# ---- what must be exact --------------------------------------------------------------------------------------------


def test_the_same_request_again_is_the_dense_prompt_on_every_layer(mini) -> None:
    engine, dense = made(KVComm, mini), made(Dense, mini)
    first, again, truth = told(engine, LONG), told(engine, LONG), told(dense, LONG)
    assert (first.reused, again.reused) == (False, True)
    assert (first.computed, again.computed) == (first.tokens, 1)
    assert first.answer.ids == again.answer.ids == truth.answer.ids
    (ours, _), (theirs, _) = read(engine, LONG), read(dense, LONG)
    assert_same_cache(ours.cache, theirs.cache)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-3, rtol=1e-3)


def test_the_first_layer_is_exact_whatever_is_estimated(mini) -> None:
    engine, dense = made(KVComm, mini, criteria=Criteria(gamma=1)), made(Dense, mini)
    for text, asked in ((LONG, ASKED), (LONGER, f"{ASKED} old"), (f"{SHORT} {LONG}", f"{ASKED} new")):
        told(engine, text, asked)
    (ours, parts), (theirs, _) = (
        read(engine, SHORT, "the code of the king is"),
        read(dense, SHORT, "the code of the king is"),
    )
    assert ours.reused
    # All but the last token, which the model reads over what was estimated before it.
    assert_same_cache(ours.cache, theirs.cache, slice(0, 1), parts[-1].stop - 1)
    assert not torch.allclose(ours.cache.layers[2].stored().values, theirs.cache.layers[2].stored().values, atol=1e-3)


def test_a_template_without_placeholders_is_the_full_prefill(mini) -> None:
    engine, dense = KVComm(*mini, 4), Dense(*mini, 4)
    for x in (engine, dense):
        x.add("ann", "the code of the list is")
    ours, truth = (x.call("ann", {}) for x in (engine, dense))
    assert ours.reused and ours.answer.ids == truth.answer.ids


def test_offsets_move_with_their_text(mini) -> None:
    # The second text's anchor was made at one position and is used at another: its keys are those of then, turned.
    engine = made(KVComm, mini, criteria=Criteria(gamma=1))
    told(engine, LONG)
    told(engine, LONGER, f"{ASKED} old")
    then, before = read(made(Dense, mini), LONG)
    kept = engine.spans.cut(then.cache, before[3].start, before[3].stop)
    reading, parts = read(engine, SHORT)
    assert reading.reused and parts[3].start != before[3].start
    ours = engine.spans.cut(reading.cache, parts[3].start, parts[3].stop)
    torch.testing.assert_close(ours.keys, kept.keys, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(ours.values, kept.values, atol=2e-4, rtol=1e-3)


def test_an_answer_is_a_segment_in_its_own_frame(mini) -> None:
    engine = made(KVComm, mini)
    call = told(engine, LONG)
    assert call.answer.base.tokens == len(call.answer.ids) == 4
    again = engine.spans.turned(call.answer.base.keys, call.tokens)[0]
    cache = MethodCache(mini[0])
    with torch.inference_mode():
        _, parts = read(engine, LONG)
        mini[0](torch.tensor([[*ids_of(parts), *call.answer.ids]]), past_key_values=cache)
    torch.testing.assert_close(again, cache.layers[0].stored().keys[0, :, call.tokens :], atol=1e-4, rtol=1e-4)


# ---- falling back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"capacity": 0}, {"most_bytes": 1000}])
def test_without_room_for_anchors_every_prompt_is_dense(mini, how) -> None:
    engine, dense = made(KVComm, mini, **how), made(Dense, mini)
    for _ in range(2):
        call = told(engine, LONG)
        assert not call.reused and "2 are needed" in call.why
        assert call.answer.ids == told(dense, LONG).answer.ids
    assert not any(pool.anchors for pool in engine.pools.values())
    assert engine.text_bytes <= how.get("most_bytes", 1 << 30)


def test_the_last_tokens_may_be_read_by_the_model(mini) -> None:
    tail = 12
    engine, dense = made(KVComm, mini, fresh=tail), made(Dense, mini)
    told(engine, LONG)
    # Another question about the same text: it lies in what is read anew, so that the answer is exact.
    call, truth = told(engine, LONG, "the code of the king is"), told(dense, LONG, "the code of the king is")
    assert call.reused and call.computed == tail and call.answer.ids == truth.answer.ids
    assert len(engine.pools["first"].anchors) == 1 and not engine.pools["second"].anchors


@pytest.mark.parametrize(
    ("template", "given"),
    [
        (TEMPLATE, (LONG, "")), ("the list is {first} and {second} . the code is", ("", SHORT)),
        ("the list {first}{second} is", (LONG, SHORT)), ("the list {first}{second} is", ("", SHORT)),
        ("the list is {first}{second}", (LONG, "")), ("the list is {first}{second}", ("", "")),
        ("the list is {first} and {second}", (LONG, "the")),
    ],
)  # fmt: skip
def test_texts_that_are_empty_or_touch_are_exact_when_they_come_again(mini, template, given) -> None:
    engine, dense = KVComm(*mini, 4), Dense(*mini, 4)
    for x in (engine, dense):
        x.add("ann", template)
    told(engine, *given)
    call, (ours, _), (theirs, _) = told(engine, *given), read(engine, *given), read(dense, *given)
    assert call.reused and call.answer.ids == told(dense, *given).answer.ids
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-3, rtol=1e-3)


def test_what_a_text_says_is_never_a_special_token(mini) -> None:
    model, tokenizer = mini
    special = tokenizer.all_special_tokens[0]
    ids = Dense(*mini, 4).segment(f"a {special} b").ids
    assert not set(ids) & set(tokenizer.all_special_ids)


# ---- siblings ------------------------------------------------------------------------------------------------------


def test_prefix_reuse_is_exact(mini) -> None:
    engine, dense = made(Prefix, mini), made(Dense, mini)
    for asked in (ASKED, "the code of the king is", ASKED):
        ours, truth = told(engine, LONG, asked), told(dense, LONG, asked)
        assert ours.answer.ids == truth.answer.ids
    assert ours.reused and ours.computed < ours.tokens / 2


def test_a_prefix_that_was_not_read_to_its_end_is_not_reused(mini) -> None:
    engine, dense = made(Prefix, mini), made(Dense, mini)
    told(engine, LONG)

    def stop(*args):
        raise RuntimeError("stopped")

    hook = mini[0].model.layers[1].register_forward_pre_hook(stop)
    try:
        with pytest.raises(RuntimeError, match="stopped"):
            told(engine, LONGER)
    finally:
        hook.remove()
    call = told(engine, LONGER)
    assert call.answer.ids == told(dense, LONGER).answer.ids and call.computed == call.tokens


def test_recomputing_all_tokens_is_exact_and_some_cost_less(mini) -> None:
    whole, dense = made(Recompute, mini, share=1.0), made(Dense, mini)
    (ours, _), (theirs, parts) = read(whole, LONG), read(dense, LONG)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-3, rtol=1e-3)
    assert_same_cache(ours.cache, theirs.cache)
    (some, _) = read(made(Recompute, mini, share=0.2), LONG)
    assert some.computed == -(-parts[-1].stop // 5) and some.reused
    none, _ = read(made(KVComm, mini, capacity=0), LONG)

    def apart(x) -> float:
        return float((x.cache.layers[2].stored().values - theirs.cache.layers[2].stored().values).norm())

    more, _ = read(made(Recompute, mini, share=0.6), LONG)
    assert 0 < apart(more) < apart(some) and apart(none) == 0


# ---- requests that cannot be ---------------------------------------------------------------------------------------


def test_templates_say_what_is_wrong_with_them(mini) -> None:
    _, tokenizer = mini
    with pytest.raises(ValueError, match="stands twice"):
        PromptTemplate.parse("a {x} b {x}", tokenizer)
    with pytest.raises(ValueError, match="begins with a placeholder"):
        PromptTemplate.parse("{x} b", tokenizer)
    touching = PromptTemplate.parse("a {x}{y}", tokenizer)
    assert touching.names == ("x", "y") and touching.pieces[1:] == ((), ())
    assert ids_of(touching.parts({"x": (1, 2), "y": ()}))[-2:] == [1, 2]
    with pytest.raises(ValueError, match=r"\{y\} got no text"):
        touching.parts({"x": (1,)})
    with pytest.raises(ValueError, match=r"\{z\} is not in the template"):
        touching.parts({"x": (1,), "y": (), "z": ()})


def test_engines_say_what_is_wrong_with_a_call(mini) -> None:
    engine = made(KVComm, mini)
    with pytest.raises(ValueError, match="unknown agent 'bob'"):
        engine.call("bob", {})
    with pytest.raises(ValueError, match="'ann' is there already"):
        engine.add("ann", TEMPLATE)
    with pytest.raises(ValueError, match=r"\{second\} got a str; give engine.segment\(text\)"):
        engine.call("ann", {"first": engine.segment(LONG), "second": ASKED})
    with pytest.raises(ValueError, match="half a character at 2 of a text"):
        engine.segment("a \ud800")
    with pytest.raises(ValueError, match="fresh=0"):
        KVComm(*mini, fresh=0)
    with pytest.raises(ValueError, match="share=1.5"):
        Recompute(*mini, share=1.5)
    with pytest.raises(ValueError, match="max_new=0"):
        Dense(*mini, 0)
    foreign = engine.segment(LONG)
    base = engine._alone(foreign.ids)
    half = Segment(foreign.ids, type(base)(base.keys.half(), base.values.half()))
    with pytest.raises(ValueError, match="same checkpoint"):
        engine.call("ann", {"first": half, "second": engine.segment(ASKED)})
