"""An agent that reads what changed: exactly the chat in which the rest is hidden."""

from __future__ import annotations

import copy

import pytest
import torch
from PIL import Image, ImageDraw

from agentkv.changes import ChangesAgent, in_part, only
from agentkv.models import AGENTS, load_adapter
from agentkv.models.chat import ChatAdapter
from agentkv.persistent import PersistentAgent
from tests.agentkv.models.tiny import tiny

GOAL, VIEWPORT, HISTORY = "Click on the red button.", (160, 210), 3
FAMILIES = {"qwen2.5-vl": "qwen2.5-vl", "qwen3-vl": "qwen3-vl", "opencua": "opencua"}


def page(step: int) -> Image.Image:
    """A page on which a box moves."""
    image = Image.linear_gradient("L").resize(VIEWPORT).convert("RGB")
    ImageDraw.Draw(image).rectangle([10 + 20 * step, 90, 50 + 20 * step, 130], fill="red")
    return image


def play(agent: PersistentAgent, number: int, pages=page) -> tuple[list, list]:
    """Decisions of `number` steps and the past that they leave; at most HISTORY screenshots are shown."""
    past, told = [], []
    agent.start(None)
    for step in range(number):
        told.append(agent.decide(GOAL, shown(past), pages(step), VIEWPORT))
        past.append((pages(step), told[-1].text))
    return told, past


def shown(past: list) -> list:
    return [(image if i > len(past) - HISTORY else None, text) for i, (image, text) in enumerate(past)]


def next_logits(agent: ChangesAgent, past: list, last: Image.Image) -> torch.Tensor:
    """Of the next step's first token, by what the agent's cache holds: [vocabulary]."""
    prompt, known = agent._prompt(shown(past), last, VIEWPORT)
    with agent._shown(prompt, known):
        out = agent.talk.fork().generate(
            **prompt.inputs, known_images=known, do_sample=False, max_new_tokens=1, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    return out.logits[0][0]


def hidden_logits(agent: ChangesAgent, past: list, last: Image.Image) -> torch.Tensor:
    """The same by the whole chat in one forward, in which nobody sees the tokens that were not told."""
    adapter, model = agent.adapter, agent.adapter.model
    images = [image for image, _ in past] + [last]
    whole = adapter.growing(GOAL, [text for _, text in past], images, [], [], VIEWPORT)
    told = agent._prompt(shown(past), last, VIEWPORT)[0].told
    seen = torch.ones(whole.columns, dtype=torch.bool)
    for (start, end), part in zip(whole.spans, told, strict=True):
        seen[start:end] = part
    mask = torch.ones(whole.columns, whole.columns, dtype=torch.bool).tril() & seen
    mask |= torch.eye(whole.columns, dtype=torch.bool)  # a row that sees nothing would be no number
    inputs = {name: x for name, x in whole.inputs.items() if name != "attention_mask"}
    if hasattr(model, "model") and hasattr(model.model, "get_rope_index"):
        text = torch.arange(whole.columns)[None]
        rotary, _ = model.model.get_rope_index(**whole.inputs)
        inputs["position_ids"] = torch.cat([text[None], rotary])
    else:
        inputs["position_ids"] = (seen.cumsum(0) - 1)[None]
    with torch.inference_mode():
        bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        return model(**inputs, attention_mask=bias[None, None], use_cache=False).logits[0, -1]


@pytest.fixture(params=FAMILIES)
def adapter(request: pytest.FixtureRequest) -> ChatAdapter:
    shared = tiny(AGENTS[FAMILIES[request.param]])
    return type(shared)(copy.deepcopy(shared.model), shared.tokenizer, shared.processor)


def test_it_is_the_chat_in_which_the_rest_is_hidden(adapter: ChatAdapter) -> None:
    agent = ChangesAgent(adapter, "full", 1.0, 4)
    _, past = play(agent, 2)
    told = agent._prompt(shown(past), page(2), VIEWPORT)[0].told
    assert told[0].all() and 0 < told[1].sum() < len(told[1]) / 2 and 0 < told[2].sum() < len(told[2]) / 2
    assert torch.allclose(next_logits(agent, past, page(2)), hidden_logits(agent, past, page(2)), atol=1e-4)


def test_where_everything_changes_it_is_the_persistent_agent(adapter: ChatAdapter) -> None:
    def noise(step: int) -> Image.Image:
        torch.manual_seed(step)
        return Image.fromarray(torch.randint(0, 255, (*VIEWPORT[::-1], 3), dtype=torch.uint8).numpy())

    ours, _ = play(ChangesAgent(adapter, "full", 1.0, 4), 4, noise)
    theirs, _ = play(PersistentAgent(adapter, "full", 1.0, 4), 4, noise)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.text, mine.reused_tokens, mine.kv_bytes) == (other.text, other.reused_tokens, other.kv_bytes)


@pytest.fixture(scope="module")
def growing() -> ChatAdapter:
    return load_adapter("mini-growing")


def test_what_it_reads_and_holds(growing: ChatAdapter) -> None:
    ours, _ = play(ChangesAgent(growing, "full", 1.0), 7)
    theirs, _ = play(PersistentAgent(growing, "full", 1.0), 7)
    assert [d.prompt_tokens for d in ours[:2]] == [d.prompt_tokens for d in theirs[:2]]
    assert ours[0].reused_tokens == theirs[0].reused_tokens == 0
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        read = mine.prompt_tokens - mine.reused_tokens
        assert read < (other.prompt_tokens - other.reused_tokens) / 3 and mine.kv_bytes < other.kv_bytes
        assert all((frame.share == 1).all() for frame in mine.frames), "every patch that is shown is held"
    assert abs(ours[-1].kv_bytes_full / theirs[-1].kv_bytes_full - 1) < 0.05, "a full cache holds whole screenshots"


def test_of_screenshots_that_left_only_what_is_still_seen_stays(growing: ChatAdapter) -> None:
    agent = ChangesAgent(growing, "full", 1.0)
    play(agent, 6)
    (row,) = {tuple(layer.flatten().tolist()) for layer in agent.talk.cache.at_rest.kept}
    needed = set(torch.cat(agent._places[-HISTORY:]).tolist())
    prompt_tokens = len(agent.talk.forgotten)
    places = {column for column in row if column < prompt_tokens}
    images = {column for places_of in agent._places for column in places_of.tolist()}
    assert places & images == needed, "of all screenshots the shown ones' patches, wherever they were read"


def test_a_page_that_stays_costs_one_token(growing: ChatAdapter) -> None:
    told, _ = play(ChangesAgent(growing, "full", 1.0), 3, lambda step: page(0))
    words = told[1].prompt_tokens - told[0].prompt_tokens - told[0].decode_tokens - told[1].frames[0].share.size
    assert told[1].prompt_tokens - told[1].reused_tokens <= words + 2


def test_what_a_method_dropped_is_read_again(growing: ChatAdapter) -> None:
    def reads(budget: float) -> int:
        told, _ = play(ChangesAgent(growing, "gui-kv", budget), 4)
        return sum(one.prompt_tokens - one.reused_tokens for one in told[1:])

    assert reads(0.1) > reads(0.6) > reads(1.0)


def test_the_model_is_as_before_and_other_calls_see_whole_pictures(growing: ChatAdapter) -> None:
    prompt, inner = growing.prompt(GOAL, [], page(0)), growing.model.model
    told = torch.zeros(len(growing.model.get_image_features(**_pixels(prompt)).pooler_output[0]), dtype=torch.bool)
    told[3:5] = True
    with torch.inference_mode(), only(growing.model, [told]):
        assert growing.model.get_image_features(**_pixels(prompt)).pooler_output[0].shape[0] == 2
    assert "get_image_features" not in vars(inner)
    whole = in_part(prompt, [torch.ones_like(told)], growing.model)
    assert whole.inputs["input_ids"].tolist() == prompt.inputs["input_ids"].tolist() and whole.spans == prompt.spans


def _pixels(prompt) -> dict[str, torch.Tensor]:
    return {name: prompt.inputs[name] for name in ("pixel_values", "image_grid_thw")}


def test_a_method_that_asks_for_grids_is_refused(growing: ChatAdapter) -> None:
    with pytest.raises(ValueError, match="star-kv asks how a screenshot's tokens lie.*use --cache persistent"):
        ChangesAgent(growing, "star-kv", 0.5)
