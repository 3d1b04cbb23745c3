"""An agent whose cache lives from step to step says what a fresh prefill of the same chat says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from agentkv.models import load_adapter
from agentkv.persistent import PersistentAgent
from textkv import Conversation

GOAL, VIEWPORT = "Click on the red button.", (160, 210)


@pytest.fixture(scope="module")
def adapter():
    return load_adapter("mini")


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (21, 16, 3), dtype=np.uint8)).resize((160, 210), Image.NEAREST)


def steps(agent, number, history=9, notes=(), first=0):
    """Decisions of `number` steps; at most `history` screenshots are shown. `notes` are put behind answers."""
    past, told = [], []
    agent.start(None)
    for step in range(number):
        shown = [(image if i >= len(past) - history + 1 else None, text) for i, (image, text) in enumerate(past)]
        decision = agent.decide(GOAL, shown, picture(first + step), VIEWPORT)
        note = f"\n[{notes[step]}]" if step < len(notes) and notes[step] else ""
        past.append((picture(first + step), decision.text + note))
        told.append(decision)
    return told, past


def whole_prompt(adapter, past, last):
    """The growing chat with the pixels of all its screenshots."""
    images = [image for image, _ in past] + [picture(last)]
    return adapter.growing(GOAL, [text for _, text in past], images, [], [], VIEWPORT)


def logits_after(agent, adapter, past, last):
    """Logits of the next step's first token, by the agent's conversation and by a fresh prefill: [vocabulary] each."""
    known = len(past)
    prompt = whole_prompt(adapter, past, last)
    patches = int(prompt.inputs["image_grid_thw"][:known].prod(1).sum())
    inputs = prompt.inputs | {"pixel_values": prompt.inputs["pixel_values"][patches:]}
    options = dict(do_sample=False, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    kept = agent.talk.fork().generate(**inputs, known_images=known, **options)
    fresh = Conversation(adapter.model).generate(**prompt.inputs, **options)
    return kept.logits[0][0], fresh.logits[0][0], prompt


def test_with_nothing_dropped_it_is_the_fresh_prefill(adapter):
    agent = PersistentAgent(adapter, "full", 1.0)
    told, past = steps(agent, 4)
    kept, fresh, _ = logits_after(agent, adapter, past, 9)
    torch.testing.assert_close(kept, fresh, atol=1e-4, rtol=1e-4)
    assert [d.reused_tokens > 0 for d in told] == [False, True, True, True]


@pytest.mark.parametrize("method", ["full", "gui-kv", "snapkv+kivi(4)"])
def test_only_what_is_new_is_read(adapter, method):
    told, past = steps(PersistentAgent(adapter, method, 0.4 if method != "full" else 1.0), 5)
    for before, after in zip(told, told[1:], strict=False):
        read = after.prompt_tokens - after.reused_tokens
        # the new turn is what the chat grew by; an answer's last token was said and not read
        assert read <= after.prompt_tokens - before.prompt_tokens - before.decode_tokens + 2


def test_notes_behind_an_answer_take_back_no_more_than_the_answer(adapter):
    agent = PersistentAgent(adapter, "gui-kv", 0.4)
    told, past = steps(agent, 3, notes=("nothing was clicked", "the page is still loading"))
    assert agent.talk.last.how in ("continued", "cropped") and told[2].reused_tokens >= told[1].prompt_tokens - 2


def test_a_screenshot_that_slid_out_is_seen_by_nothing_that_comes_later(adapter):
    agent = PersistentAgent(adapter, "full", 1.0)
    told, past = steps(agent, 3, history=2)
    kept, all_seen, prompt = logits_after(agent, adapter, past, 9)
    assert not torch.allclose(kept, all_seen, atol=1e-2), "the screenshot made no difference"
    # the third step was the first that did not show the first screenshot
    expected = masked_logits(adapter, prompt, hidden=prompt.spans[0], since=_turn_of(prompt, 2, told))
    torch.testing.assert_close(kept, expected, atol=1e-4, rtol=1e-4)
    assert len(told[2].frames) == 2 and told[2].spans[0] == tuple(prompt.spans[1])


def _turn_of(prompt, step, told):
    """The column from which on step `step` read: what was reused, counted with what was forgotten then."""
    start, end = prompt.spans[0]
    return told[step].reused_tokens + end - start


def masked_logits(adapter, prompt, hidden, since):
    """A forward of the whole chat in which columns from `since` on do not see the columns [start, end) of `hidden`."""
    model, ids = adapter.model, prompt.inputs["input_ids"]
    n = ids.shape[1]
    visible = torch.ones(n, n, dtype=torch.bool).tril()
    visible[since:, hidden[0] : hidden[1]] = False
    mask = torch.zeros(1, 1, n, n).masked_fill(~visible, torch.finfo(torch.float32).min)
    rope, _ = model.model.get_rope_index(
        ids, image_grid_thw=prompt.inputs["image_grid_thw"], mm_token_type_ids=prompt.inputs["mm_token_type_ids"]
    )
    embeds = model.get_input_embeddings()(ids)
    seen = model.model.get_image_features(prompt.inputs["pixel_values"], prompt.inputs["image_grid_thw"])
    seen = seen.pooler_output if hasattr(seen, "pooler_output") else seen
    seen = torch.cat(list(seen)) if isinstance(seen, tuple | list) else seen
    embeds = embeds.masked_scatter((ids == model.config.image_token_id)[..., None], seen)
    with torch.no_grad():
        out = model.model.language_model(
            inputs_embeds=embeds, position_ids=rope, attention_mask={"full_attention": mask}, use_cache=False
        )
        return model.lm_head(out.last_hidden_state[0, -1])


@pytest.mark.parametrize("history", [9, 2])
def test_at_rest_the_budget_holds_of_what_remains(adapter, history):
    told, _ = steps(PersistentAgent(adapter, "gui-kv", 0.4), 5, history=history)
    for decision in told:
        assert decision.tokens_stored <= 0.4 * decision.prompt_tokens + 1
    if history == 2:
        assert told[-1].prompt_tokens < 1.5 * told[1].prompt_tokens + sum(d.decode_tokens + 40 for d in told)


def test_two_agents_that_take_turns_do_not_touch_each_other(adapter):
    alone = [[d.text for d in steps(PersistentAgent(adapter, "gui-kv", 0.4), 3, first=f)[0]] for f in (0, 20)]
    agents, pasts = [PersistentAgent(adapter, "gui-kv", 0.4) for _ in range(2)], [[], []]
    for step in range(3):
        for which, (agent, past) in enumerate(zip(agents, pasts, strict=True)):
            decision = agent.decide(GOAL, past, picture(20 * which + step), VIEWPORT)
            past.append((picture(20 * which + step), decision.text))
    assert [[text for _, text in past] for past in pasts] == alone


def test_a_saved_conversation_goes_on_without_reading(adapter, tmp_path):
    agent = PersistentAgent(adapter, "gui-kv", 0.4)
    _, past = steps(agent, 3)
    agent.talk.save(tmp_path)
    expected = agent.decide(GOAL, past, picture(7), VIEWPORT)
    again = PersistentAgent(adapter, "gui-kv", 0.4)
    steps(again, 3)
    again._episode.talk = Conversation.load(tmp_path, adapter.model)
    decision = again.decide(GOAL, past, picture(7), VIEWPORT)
    assert (decision.text, decision.reused_tokens) == (expected.text, expected.reused_tokens) and expected.reused_tokens


@pytest.mark.parametrize("method", ["streaming_llm", "h2o", "cake", "adakv"])
def test_what_cannot_be_taken_back_is_read_again_from_the_screenshots_that_are_shown(adapter, method):
    agent = PersistentAgent(adapter, method, 0.5)
    told, _ = steps(agent, 4, history=2, notes=("a note", "another", "a third"))
    assert all(d.prompt_tokens > 0 for d in told) and len(told[-1].frames) == 2


def test_another_goal_or_a_step_that_is_missing_begins_anew(adapter):
    agent = PersistentAgent(adapter, "full", 1.0)
    _, past = steps(agent, 2)
    assert agent.decide("Type a word.", past, picture(5), VIEWPORT).reused_tokens == 0
    _, past = steps(agent, 2)
    assert agent.decide(GOAL, past[:1], picture(5), VIEWPORT).reused_tokens == 0


def test_known_images_must_be_known(adapter):
    prompt = whole_prompt(adapter, [], 0)
    with pytest.raises(ValueError, match="known_images=1: 0 images"):
        Conversation(adapter.model).generate(**prompt.inputs, known_images=1, max_new_tokens=1)
