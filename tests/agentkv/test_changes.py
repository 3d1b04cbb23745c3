"""An agent that reads what changed: what it says is what a plain cache says whose keys were turned by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import DynamicCache

from agentkv.changes import ChangesAgent, in_part, only
from agentkv.models import AGENTS, load_adapter
from agentkv.models.chat import ChatAdapter
from agentkv.persistent import PersistentAgent
from tests.agentkv.models.tiny import tiny

GOAL, VIEWPORT, HISTORY = "Click on the red button.", (160, 210), 3
FAMILIES = {"qwen2.5-vl": "qwen2.5-vl", "qwen3-vl": "qwen3-vl"}


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


@torch.inference_mode()
def by_hand(adapter: ChatAdapter, agent: ChangesAgent, past: list, last: Image.Image) -> torch.Tensor:
    """Logits behind the next prompt, by transformers' own cache: each turn's new columns at their positions, before it
    the keys of all patches that were not told turned to the newest picture: [vocabulary]."""
    model, cache, at, read = adapter.model, DynamicCache(config=adapter.model.config), {}, 0
    images, answers = [image for image, _ in past] + [last], [text for _, text in past]
    inv_freq = model.model.language_model.rotary_emb.inv_freq
    for step in range(len(images)):
        whole = adapter.growing(GOAL, answers[:step], images[: step + 1], [], [], VIEWPORT)
        told = [torch.ones(end - start, dtype=torch.bool) for start, end in whole.spans]
        seen = [adapter.processor(images=[x], return_tensors="pt")["pixel_values"] for x in images[: step + 1]]
        for number in range(1, step + 1):
            now, before = (x.view(len(told[number]), -1) for x in (seen[number], seen[number - 1]))
            told[number] = (now != before).any(1)
        prompt = in_part(whole, told, model)
        for column, place, own in zip(prompt.places[-1].tolist(), prompt.turns[-1].tolist(), told[-1], strict=True):
            if not own:
                angle = (place - at[column]) * torch.cat([inv_freq, inv_freq])
                for layer in cache.layers:
                    key = layer.keys[:, :, column]
                    half = torch.cat([-key[..., key.shape[-1] // 2 :], key[..., : key.shape[-1] // 2]], -1)
                    layer.keys[:, :, column] = key * angle.cos() + half * angle.sin()
            at[column] = place
        ids = prompt.inputs["input_ids"]
        text = torch.arange(ids.shape[1])[None, None]
        places = torch.cat([text, prompt.inputs["position_ids"]])
        with only(model, told[-1:]):
            out = model(
                input_ids=ids[:, read:], position_ids=places[..., read:], past_key_values=cache,
                mm_token_type_ids=prompt.inputs["mm_token_type_ids"][:, read:], pixel_values=seen[-1],
                image_grid_thw=prompt.inputs["image_grid_thw"][-1:],
            )  # fmt: skip
        read = ids.shape[1]
    return out.logits[0, -1]


def by_agent(agent: ChangesAgent, past: list, last: Image.Image) -> torch.Tensor:
    """The same by the agent's conversation."""
    found: list[torch.Tensor] = []
    own = agent.talk.generate

    def generate(**options: object) -> torch.Tensor:
        out = own(**options, output_logits=True, return_dict_in_generate=True)
        found.append(out.logits[0][0])
        return out.sequences

    agent.talk.generate = generate
    agent.decide(GOAL, shown(past), last, VIEWPORT)
    return found[0]


@pytest.fixture(params=FAMILIES)
def adapter(request: pytest.FixtureRequest) -> ChatAdapter:
    shared = tiny(AGENTS[FAMILIES[request.param]])
    return type(shared)(copy.deepcopy(shared.model), shared.tokenizer, shared.processor)


def test_it_is_a_plain_cache_whose_keys_were_turned(adapter: ChatAdapter) -> None:
    agent = ChangesAgent(adapter, "full", 1.0, 4)
    _, past = play(agent, 2)
    told = agent._prompt(shown(past), page(2), VIEWPORT)[0].told
    assert told[0].all() and 0 < told[1].sum() < len(told[1]) / 2 and 0 < told[2].sum() < len(told[2]) / 2
    expected = by_hand(adapter, agent, past, page(2))
    assert torch.allclose(by_agent(agent, past, page(2)), expected, atol=1e-4)


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


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("star-kv", "asks how a screenshot's tokens lie.*use --cache persistent"),
        ("gui-kv-next", "holds keys in a form that cannot be turned"),
        ("streaming_llm", "cannot be turned"),
    ],
)
def test_a_method_that_cannot_be_right_is_refused(growing: ChatAdapter, method: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ChangesAgent(growing, method, 0.5)


def test_a_model_whose_positions_tell_no_place_is_refused() -> None:
    with pytest.raises(ValueError, match="does not tell a patch's place.*use --cache persistent"):
        ChangesAgent(tiny(AGENTS["opencua"]), "full", 1.0)


def test_what_is_read_again_at_once_is_read_whole(growing: ChatAdapter) -> None:
    agent = ChangesAgent(growing, "full", 1.0)
    _, past = play(agent, 3)
    agent.start(None)  # as after an answer that is told otherwise than it was said
    agent._episode = agent._begun(GOAL, 1)
    prompt, known = agent._prompt(shown(past), page(3), VIEWPORT)
    assert known == 0 and len(prompt.told) == 3 and all(part.all() for part in prompt.told)
