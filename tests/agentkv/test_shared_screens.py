"""A planner and an actor of one model share a screenshot's KV: it stands behind other words, and is not read again."""

from __future__ import annotations

import pytest
import torch

from agentkv.models import load_adapter
from tests.textkv.tiny import build
from textkv.reuse.kvcomm import Dense, KVComm, Picture, Prefix, Recompute, Team, picture

from .models.build import screenshot

ROLES = {"planner": "You plan. Say what is to be done on this page.", "actor": "You act: where to click?"}
GOAL = "Click on the tab."
SHARED = ("screenshot", "goal")


@pytest.fixture(scope="module")
def mini():
    adapter = load_adapter("mini")
    adapter.model.generation_config.eos_token_id = None
    return adapter


@pytest.fixture(scope="module")
def screens(mini) -> list[Picture]:
    return [picture(mini.model, mini.processor, screenshot(n, 320, 180)) for n in range(4)]


def team(kind, mini, layout="role", **how) -> Team:
    return Team.chain(kind(mini.model, mini.tokenizer, 4, **how), ROLES, shared=SHARED, layout=layout)


def parts_of(engine: Dense, agent: str, screen: Picture):
    """Parts of an agent's prompt, and what was given; the actor reads a plan of two words."""
    given = {"screenshot": engine.segment(screen), "goal": engine.segment(GOAL)}
    given |= {} if agent == "planner" else {"planner": engine.segment("do it")}
    return engine.templates[agent].parts(given), given


def told_by_the_model(adapter, parts):
    """Positions int64 [3, tokens] that the model itself gives a prompt."""
    ids = torch.tensor([[token for part in parts for token in part.ids]])
    grid = next(part.picture.grid for part in parts if part.picture)
    kinds = (ids == adapter.model.config.image_token_id).long()
    return adapter.model.model.get_rope_index(ids, image_grid_thw=grid, mm_token_type_ids=kinds)[0][:, 0]


def held(cache, start: int, stop: int, layers: slice = slice(None)):
    """Keys and values of a piece of a prompt, [layers, kv_heads, tokens, head_dim]."""
    stored = [layer.stored() for layer in cache.layers[layers]]
    return [torch.cat([getattr(x, name)[:, :, start:stop] for x in stored]) for name in ("keys", "values")]


def same(ours, truth, atol: float = 2e-4) -> None:
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-3)


@torch.inference_mode()
def test_positions_are_the_models_own_on_all_axes(mini, screens) -> None:
    from textkv.reuse.kvcomm.template import places_of

    engine = team(Dense, mini).engine
    starts = []
    for agent in ROLES:
        parts, _ = parts_of(engine, agent, screens[0])
        assert torch.equal(places_of(parts), told_by_the_model(mini, parts))
        starts.append(parts[1].place)
    assert starts[0] != starts[1]  # else nothing is moved
    assert screens[0].extent < len(screens[0].ids) and not torch.equal(*screens[0].offsets[1:])


@torch.inference_mode()
def test_a_dense_prompt_is_what_the_model_says_of_it(mini, screens) -> None:
    engine = team(Dense, mini).engine
    parts, given = parts_of(engine, "actor", screens[1])
    ids = torch.tensor([[token for part in parts for token in part.ids]])
    kinds = (ids == mini.model.config.image_token_id).long()
    seen = {"pixel_values": screens[1].pixels, "image_grid_thw": screens[1].grid, "mm_token_type_ids": kinds}
    truth = mini.model(ids, attention_mask=torch.ones_like(ids), **seen).logits[0, -1]
    torch.testing.assert_close(engine._read("actor", parts, given).logits, truth, atol=2e-4, rtol=1e-3)
    mini.model.model.rope_deltas = None


@torch.inference_mode()
def test_the_first_layer_of_a_moved_screenshot_is_exact(mini, screens) -> None:
    sharing = team(KVComm, mini)
    parts, given = parts_of(sharing.engine, "actor", screens[0])
    truth = Dense._read(sharing.engine, "actor", parts, given).cache
    alone = sharing.engine._base("actor", parts[1], given)  # as read behind a header of two words
    placed = sharing.engine.spans.placed([alone], [parts[1].place])
    first = held(truth, parts[1].start, parts[1].stop, slice(0, 1))
    same([placed.keys[:1], placed.values[:1]], first)
    # By its tokens instead of its positions, or left where it was, it would be another picture.
    for wrong in (parts[1].place + 1, 0):
        off = sharing.engine.spans.placed([alone], [wrong]).keys[:1]
        assert (off - first[0]).abs().max() > 0.01
    assert (placed.values[1:] - held(truth, parts[1].start, parts[1].stop)[1][1:]).abs().max() > 1e-3


def test_the_same_screenshot_again_is_the_dense_prompt(mini, screens) -> None:
    sharing, dense = team(KVComm, mini), team(Dense, mini)
    given = {"screenshot": screens[0], "goal": GOAL}
    truth = dense.run(given)
    for reused in (False, True):
        calls = sharing.run(given)
        assert [call.reused for call in calls] == [reused] * 2
        assert [call.answer.ids for call in calls] == [call.answer.ids for call in truth]
    assert [call.computed for call in calls] == [1, 1]
    parts, given = parts_of(sharing.engine, "planner", screens[0])
    with torch.inference_mode():
        ours = sharing.engine._read("planner", parts, given)
        full = Dense._read(sharing.engine, "planner", parts, given)
    assert ours.reused
    same(held(ours.cache, 0, parts[-1].stop - 1), held(full.cache, 0, parts[-1].stop - 1))
    torch.testing.assert_close(ours.logits, full.logits, atol=1e-3, rtol=1e-3)


def test_another_screenshot_of_the_size_is_not_taken_for_it(mini, screens) -> None:
    sharing = team(KVComm, mini)
    assert screens[0].ids == screens[1].ids
    sharing.run({"screenshot": screens[0], "goal": GOAL})
    calls = sharing.run({"screenshot": screens[1], "goal": GOAL})
    assert [call.reused for call in calls] == [False, False] and "anchors" in calls[0].why


def test_a_third_screenshot_may_be_estimated_and_one_of_another_shape_is_read(mini, screens) -> None:
    sharing = Team.star(
        KVComm(mini.model, mini.tokenizer, 4, criteria=__import__("textkv").reuse.kvcomm.Criteria(gamma=1.0)),
        ROLES, shared=("screenshot",),
    )  # fmt: skip
    for screen in screens[:2]:
        sharing.run({"screenshot": screen})
    planner, _ = sharing.run({"screenshot": screens[2]})
    assert planner.reused and planner.computed == 1
    wide = picture(mini.model, mini.processor, screenshot(0, 480, 180))
    assert wide.shape != screens[0].shape
    planner, _ = sharing.run({"screenshot": wide})
    assert not planner.reused and planner.why.startswith("{screenshot}: 0 anchors")


def test_a_screenshot_first_is_read_once_and_exactly(mini, screens) -> None:
    dense, prefix = (team(kind, mini, "shared") for kind in (Dense, Prefix))
    for screen in (screens[0], screens[1], screens[0]):
        given = {"screenshot": screen, "goal": GOAL}
        ours, truth = prefix.run(given), dense.run(given)
        assert [call.answer.ids for call in ours] == [call.answer.ids for call in truth]
        # The planner's prompt before it had another screenshot, though the same tokens.
        assert ours[0].computed >= len(screen.ids) and ours[1].computed < len(screen.ids)


def test_the_tokens_that_are_always_read_never_cut_a_picture(mini, screens) -> None:
    engine = KVComm(mini.model, mini.tokenizer, 4, fresh=12)
    engine.add("ann", "Look: {screenshot} What is it?")
    engine.fresh = 3 + len(engine.templates["ann"].pieces[-1])
    given = {"screenshot": engine.segment(screens[0])}
    truth = Dense(mini.model, mini.tokenizer, 4)
    truth.add("ann", "Look: {screenshot} What is it?")
    call = engine.call("ann", given)
    assert call.reused and call.computed == len(screens[0].ids) + len(engine.templates["ann"].pieces[-1])
    assert call.answer.ids == truth.call("ann", given).answer.ids


def test_what_cannot_share_pictures_says_so(mini, screens) -> None:
    with pytest.raises(ValueError, match="no model of the Qwen-VL families"):
        picture(build("llama"), mini.processor, screenshot())
    with pytest.raises(ValueError, match="cannot be read again one by one"):
        team(Recompute, mini).run({"screenshot": screens[0], "goal": GOAL})
