"""The mini model: tokenizer, packing equal to the prompt, the trainer's forward equal to the model's, state on disk,
weights.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import PreTrainedTokenizerFast

from agentkv.envs import fonts
from agentkv.models import EMBEDDED, AgentText, load_adapter
from agentkv.models.ui_tars import UiTarsAdapter
from training.agent.drawn import click, drawn_turn, face
from training.agent.drawn_memory import drawn_episode
from training.agent.episodes import HISTORY_FRAMES, EpisodeStore, thoughtful, write_episodes
from training.agent.feed import Mix
from training.agent.files import AGENT, SYSTEM, processor_settings
from training.agent.forward import answer_logits, read
from training.agent.hints import Hints, looks
from training.agent.packing import Ask, Look, Packer, Turn, collate
from training.agent.rounds import drawn_rounds
from training.agent.shape import CELLS
from training.agent.tokenizer import build_tokenizer
from training.agent.train import AgentSettings, AgentTrainer, Meter, fresh_model, soft_targets

GOAL = "Click on the red box."
ANSWER = "Action: click(start_box='(84,112)')"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer([GOAL, "Remember the code, then type it.", "system\nuser\nassistant\n"] * 3)


@pytest.fixture(scope="module")
def adapter(tokenizer: PreTrainedTokenizerFast) -> UiTarsAdapter:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    torch.manual_seed(0)
    settings = {k: v for k, v in processor_settings().items() if not k.endswith(("_type", "_class"))}
    text = AgentText(**{k: AGENT[k] for k in ("system", "prompt", "history_frames")})
    return UiTarsAdapter(fresh_model(tokenizer).eval(), tokenizer, Qwen2VLImageProcessorPil(**settings), text)


def test_tokenizer_is_compact_and_lossless(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = tokenizer.tokenize(ANSWER)
    assert pieces == ["Action: click(start_box='(", "84", ",", "112", ")')"]
    for text in (ANSWER, "Action: type(content='a7Z, 48')", 'Enter "Zoë" (x,y) into\nit', "<|im_start|>user\n1,234"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("code 4821")[-4:] == ["4", "8", "2", "1"]
    assert tokenizer.tokenize("(0,255)")[1:4] == ["0", ",", "255"]


def shots(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 255, (210, 160, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("growing", [False, True])
def test_every_packed_step_is_the_prompt_of_that_step(adapter: UiTarsAdapter, growing: bool) -> None:
    images, other = shots(2), Ask("Remember the code, then type it.", "Action: type(content='48')", "copy")
    asks = [Ask(GOAL, ANSWER, "a")] if growing else [other, Ask(GOAL, ANSWER, "a")]
    turns = [
        Turn(np.asarray(images[0]), asks, "Action: wait()", GOAL),
        Turn(np.asarray(images[1]), asks, goal=GOAL),
    ]
    packed = Packer(adapter.tokenizer, SYSTEM).pack(turns, growing)
    batch = collate([packed], adapter.tokenizer.pad_token_id)
    history: list[tuple[Image.Image, str]] = []
    with torch.no_grad():
        logits, targets = answer_logits(adapter.model, batch, read(adapter.model, batch))
        expected = []
        for turn, image in zip(turns, images, strict=True):
            for ask in turn.asks:
                prompt = adapter.prompt(ask.goal, history, image)
                if growing:
                    shown, answers = [shot for shot, _ in history], [answer for _, answer in history]
                    prompt = adapter.growing(ask.goal, answers, [*shown, image], [], [])
                said = adapter.tokenizer(ask.answer + "<|im_end|>", return_tensors="pt")["input_ids"]
                inputs = dict(prompt.inputs)
                inputs["input_ids"] = torch.cat([inputs["input_ids"], said], 1)
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                kinds = inputs["mm_token_type_ids"]
                inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(said, dtype=kinds.dtype)], 1)
                expected.append(adapter.model(**inputs).logits[0, -said.shape[1] - 1 : -1])
            history.append((image, turn.reply or ""))
    torch.testing.assert_close(logits, torch.cat(expected), atol=2e-3, rtol=1e-3)
    said = "".join(ask.answer + "<|im_end|>" for turn in turns for ask in turn.asks)
    assert adapter.tokenizer.decode(targets) == said


def test_a_forgotten_screenshot_leaves_its_place(adapter: UiTarsAdapter) -> None:
    images = [np.asarray(image) for image in shots(2)]
    turns = [Turn(images[0], reply="Action: wait()", goal=GOAL), Turn(images[1], [Ask(GOAL, ANSWER, "a")])]
    packer = Packer(adapter.tokenizer, SYSTEM)
    whole, gone = packer.pack(turns, True), packer.pack([replace(turns[0], image=None), turns[1]], True)
    first = whole.ids.index(packer.image_id)
    kept = [i for i in range(len(whole.ids)) if not first <= i < first + CELLS[0] * CELLS[1]]
    assert gone.ids == [whole.ids[i] for i in kept]
    np.testing.assert_array_equal(gone.positions, whole.positions[:, kept])


def test_rounds_ask_for_nothing_that_is_gone() -> None:
    rng = random.Random(4)
    for _ in range(20):
        turns = drawn_rounds(rng)
        shown = [turn.image is not None for turn in turns]
        assert sum(shown) <= max(HISTORY_FRAMES) + 1 and shown == sorted(shown) and turns[-1].asks
        looks = [look for turn in turns for ask in turn.asks for look in ask.looks]
        assert all(0 <= look.screen < sum(shown) for look in looks)


def test_hints_measure_the_attention_that_the_layer_pays(adapter: UiTarsAdapter) -> None:
    rng = random.Random(2)
    batch = collate([Packer(adapter.tokenizer, SYSTEM).pack([drawn_turn(rng)]) for _ in range(2)], 0)
    assert len(batch.hints)
    with torch.no_grad():
        reading = read(adapter.model, batch)
        mass = looks(batch, reading)
        assert ((mass >= 0) & (mass <= 1)).all()
        assert Hints(192)(batch, reading, adapter.model.config.image_token_id).isfinite()
    rows, queries, keys = batch.hints.unbind(1)
    assert (batch.ids[rows, keys] == adapter.model.config.image_token_id).all()
    assert (keys < queries).all()


def test_place_heads_fall_by_row_and_by_column(adapter: UiTarsAdapter) -> None:
    blank = Turn(np.full((210, 160, 3), 255, dtype=np.uint8), [Ask(GOAL, ANSWER, "a")])
    batch = collate([Packer(adapter.tokenizer, SYSTEM).pack([blank])], 0, 1)
    with torch.no_grad():
        after = read(adapter.model, batch, hint_layer=1).hidden[batch.ids == adapter.model.config.image_token_id]
    grid = after.view(16, 12, -1)
    assert (grid[0, 0] - grid[15, 0]).norm() > 0.5
    assert (grid[0, 0] - grid[0, 11]).norm() > 0.5


def test_pages_are_drawn_with_the_projects_faces(monkeypatch: pytest.MonkeyPatch) -> None:
    faces = {face(size, weight) for size in (10, 26) for weight in ("plain", "bold")}
    assert {Path(made.path) for made in faces} == {fonts.face("sans"), fonts.face("sans", "Bold")}
    assert {made.layout_engine for made in faces} == {ImageFont.Layout.BASIC}
    # nothing else is opened for a page
    monkeypatch.setattr(ImageFont, "load_default", None)
    monkeypatch.setattr(ImageDraw.ImageDraw, "getfont", None)
    drawn_turn(random.Random(0))
    drawn_episode(random.Random(0))


def test_drawn_data_is_sound() -> None:
    rng = random.Random(0)
    for _ in range(40):
        episode = drawn_episode(rng)
        assert episode[-1].reply is None and all(turn.reply for turn in episode[:-1])
        for turn in [drawn_turn(rng), *episode]:
            assert turn.image is not None and turn.image.shape == (210, 160, 3) and turn.asks
            assert all(ask.answer.startswith(("Action: ", "Thought: ")) for ask in turn.asks)
    assert click(80, 105) == ANSWER


def test_a_thought_tells_nothing_before_it_is_asked_for() -> None:
    """The text history must not carry what the pages show, or no screenshot would be needed."""
    rng = random.Random(3)
    for _ in range(40):
        for turn in drawn_episode(rng):
            goal = turn.asks[0]
            if not goal.looks:
                assert goal.answer.partition("\n")[0] in ("Thought: Next", "Thought: field", "Thought: OK")


def test_looks_point_into_the_screenshot_that_showed_the_words(adapter: UiTarsAdapter) -> None:
    image, words = np.zeros((210, 160, 3), dtype=np.uint8), "Action: finished(content='42')"
    asks = [Ask("What was the code?", words, "a", (Look(0, 3, 5), Look(0, 8, 5)))]
    packed = Packer(adapter.tokenizer, SYSTEM).pack([Turn(image, [], ANSWER), Turn(image, asks)])
    pictures = [i for i, token in enumerate(packed.ids) if token == adapter.model.config.image_token_id]
    assert [hint.key for hint in packed.hints] == [pictures[5 * 12 + 3], pictures[5 * 12 + 8]] * 2
    said = adapter.tokenizer.decode([packed.ids[hint.query + 1] for hint in packed.hints[:2]])
    assert said == "42"
    assert {packed.ids[hint.query + 1] for hint in packed.hints[2:]} == {
        adapter.tokenizer.convert_tokens_to_ids("Action: finished(content='")
    }


def test_recorded_memory_episodes_get_their_thoughts() -> None:
    def step(answer: str, *names: str) -> dict:
        return {"answer": answer, "asks": [[name, answer, "real"] for name in names]}

    typed = "Action: type(content='47')"
    steps = [
        step(ANSWER, 'Click on the "Next" button.', "Read (84,112)"),
        step(ANSWER),
        step(typed),
        step(ANSWER, "Click on OK."),
        step(ANSWER, 'Click on the "field 3" button.'),
        step(ANSWER, "Click on blue circle."),
    ]
    answers = [answer.split("\n")[0] for answer, _ in thoughtful({"task": "memory-code", "steps": steps})]
    assert answers == [f"Thought: {name}" for name in ("Next", "field", "47", "OK", "3", "blue circle")]
    assert thoughtful({"task": "click-tab", "steps": steps})[0] == (ANSWER, "click-tab")


def test_soft_targets_spread_over_near_coordinates_only(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, weights = soft_targets(tokenizer)
    number = tokenizer.convert_tokens_to_ids("84")
    assert tokenizer.convert_ids_to_tokens(ids[number].tolist()) == ["76", "80", "84", "88", "92"]
    assert weights[number].argmax() == 2 and weights[number].sum() == pytest.approx(1)
    digit = tokenizer.convert_tokens_to_ids("4")
    assert weights[digit].tolist() == [0, 0, 1, 0, 0]


def test_meter_counts_whole_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    turn = Turn(np.zeros((210, 160, 3), dtype=np.uint8), [Ask(GOAL, ANSWER, "a"), Ask(GOAL, ANSWER, "b")])
    batch = collate([Packer(tokenizer, SYSTEM).pack([turn])], 0)
    targets = batch.labels[batch.labels != -100]
    said = targets.clone()
    said[1] = tokenizer.convert_tokens_to_ids("88")
    said[-1] = tokenizer.convert_tokens_to_ids(",")
    meter = Meter(soft_targets(tokenizer)[0])
    meter.add(batch, torch.nn.functional.one_hot(said, len(tokenizer)).float(), targets, torch.tensor(1.0))
    assert meter.line() == "loss 1.000 | a:100 b:0"


def test_recorded_episodes_come_back(tmp_path: Path) -> None:
    screens = [np.full((210, 160, 3), shade, dtype=np.uint8) for shade in (10, 20)]
    steps = [{"screen": 0, "answer": "Action: wait()", "asks": []}, {"screen": 1, "answer": ANSWER, "asks": []}]
    write_episodes(tmp_path / "t-1.npz", screens, [{"task": "t", "seed": 1, "goal": GOAL, "steps": steps}])
    store = EpisodeStore(tmp_path)
    store.refresh()
    assert len(store) == 1
    sampled = [store.sample(random.Random(seed)) for seed in range(6)]
    turns = max(sampled, key=len)
    assert [turn.reply for turn in turns] == ["Action: wait()", None]
    assert turns[1].asks == [Ask(GOAL, ANSWER, "t")]
    assert turns[1].image is not None and turns[1].image[0, 0, 0] == 20


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="minutes=0 must be positive"):
        AgentSettings(minutes=0)
    with pytest.raises(ValueError, match="are not shares of one whole"):
        Mix(drawn=0.8, memory=0.5)
    config = AgentSettings(minutes=100, rate=1.0, warmup=10, fall=0.5)
    assert config.rate_at(0, 0) == pytest.approx(0.1)
    assert config.rate_at(50, 0.1) == 1.0
    assert config.rate_at(50, 0.75) == pytest.approx(0.5)
    assert config.rate_at(50, 1.0) == pytest.approx(0.02)


def test_a_resumed_training_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    settings = AgentSettings(device="cpu", workers=0, warmup=2)
    one = AgentTrainer(settings, tmp_path)
    batch = collate([Packer(one.tokenizer, SYSTEM).pack([drawn_turn(random.Random(1))])], one.tokenizer.pad_token_id)
    one.learn(batch)
    one.seconds = 7.0
    one.save()
    two = AgentTrainer(settings, tmp_path)
    assert (two.step, two.seconds) == (1, 7.0)
    # What only the trainer needs is learned anew after a restart.
    two.hints.load_state_dict(one.hints.state_dict())
    for trainer in (one, two):
        trainer.learn(batch)
    for (name, a), b in zip(one.model.named_parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(one.average[name], two.average[name]), name
    assert load_adapter(tmp_path / "latest").history_frames == 9


@pytest.mark.parametrize("name", list(EMBEDDED))
def test_shipped_weights_load_and_answer(name: str) -> None:
    adapter = load_adapter(name)
    assert adapter.cache == {"mini": "fresh", "mini-growing": "persistent"}[name]
    assert (EMBEDDED[name] / "model.safetensors").stat().st_size <= 16 * 2**20
    assert adapter.model.config.model_type == "qwen2_5_vl"
    assert adapter.history_frames == 9
    prompt = adapter.prompt("Click on Tab #1.", [], Image.new("RGB", (160, 210), "white"))
    with torch.inference_mode():
        out = adapter.model.generate(**prompt.inputs, max_new_tokens=16, do_sample=False)
    text = adapter.tokenizer.decode(out[0, prompt.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.startswith("Action: ")


@pytest.mark.browser
def test_shipped_weights_solve_a_page() -> None:
    from agentkv import envs
    from training.agent.evaluate import FIRST_SEED, play

    adapter = load_adapter("mini")
    with envs.Browser() as browser:
        env = envs.make("click-tab", browser)
        solved = [play(adapter, env, FIRST_SEED + number, adapter.history_frames)[0] for number in range(3)]
        env.close()
    assert any(solved)
