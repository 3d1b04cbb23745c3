"""OpenCUA: its checkpoint layout key by key, its logits against plain torch, its prompt, its caches, its errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import DynamicCache

import textkv
from agentkv.envs.actions import Click
from agentkv.grammars import CoordinateSpace
from agentkv.models import load_adapter
from agentkv.models.opencua import OPENCUA, OpenCuaAdapter
from agentkv.models.opencua_model import OpenCuaConfig
from tests.agentkv.models import opencua_checkpoint as official
from tests.agentkv.models.build import screenshot
from textkv.attention import use
from textkv.cache import MethodCache
from textkv.conformance import check_method

SHAPE = official.Shape()
GOAL = "Buy the lamp."
ANSWER = "## Thought:\nA lamp.\n\n## Action:\nClick it.\n\n## Code:\n```python\npyautogui.click(x=1, y=2)\n```\n"


@pytest.fixture(scope="module")
def weights() -> official.Weights:
    return official.weights(SHAPE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, weights: official.Weights) -> Path:
    place = tmp_path_factory.mktemp("opencua") / "OpenCUA-7B"
    official.write(place, SHAPE, weights)
    return place


@pytest.fixture(scope="module")
def adapter(folder: Path) -> OpenCuaAdapter:
    return load_adapter(folder)


def shot() -> Image.Image:
    return screenshot(0, 320, 240)


def test_every_tensor_of_the_published_layout_is_loaded(adapter: OpenCuaAdapter, weights: official.Weights) -> None:
    loaded = adapter.model.state_dict()
    assert sorted(loaded) == sorted(weights)
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor), name
    assert adapter.model.generation_config.eos_token_id == 257


def test_it_saves_the_layout_that_it_loads(adapter: OpenCuaAdapter, weights: official.Weights, tmp_path: Path) -> None:
    adapter.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert sorted(saved) == sorted(weights)
    assert OpenCuaConfig.from_pretrained(tmp_path).text_config.hidden_size == SHAPE.hidden


@pytest.mark.parametrize("sizes", [[], [(320, 240)], [(320, 240), (200, 500), (100, 60)]])
def test_logits_are_those_of_plain_torch(
    adapter: OpenCuaAdapter, weights: official.Weights, sizes: list[tuple[int, int]]
) -> None:
    past = [(screenshot(n, *size), ANSWER) for n, size in enumerate(sizes)]
    inputs = adapter.prompt(GOAL, past, shot()).inputs
    adapter.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        ours = adapter.model(**inputs).logits[0]
        token = adapter.model.config.image_token_id
        expected = official.logits(
            SHAPE, weights, inputs["input_ids"][0], inputs["pixel_values"], inputs["image_grid_thw"], token
        )
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-3)
    assert expected.std() > 0.1  # not all the same, so that equality says something


def test_prompt_is_the_chat_of_the_family(adapter: OpenCuaAdapter) -> None:
    past = [(None, ANSWER), (shot(), ANSWER), (shot(), "nothing to read\n[the reply holds no code]")]
    prompt = adapter.prompt(GOAL, past, shot())
    ids, token = prompt.inputs["input_ids"], adapter.model.config.image_token_id
    assert len(prompt.spans) == 3
    covered = torch.zeros_like(ids, dtype=torch.bool)
    for start, end in prompt.spans:
        covered[0, start:end] = True
        # begin, the word "image" (bytes here), content, then the placeholders
        before = adapter.tokenizer.decode(ids[0, start - 7 : start])
        assert before == "<|media_begin|>image<|media_content|>"
        assert adapter.tokenizer.decode(ids[0, end]) == "<|media_end|>"
    assert torch.equal(covered, ids == token)
    picture = "<|media_begin|>image<|media_content|><|media_end|>"
    said = "## Thought:\nA lamp.\n\n## Action:\nClick it.\n"
    system = OPENCUA.system.replace("{width}", "252").replace("{height}", "168")
    assert adapter.tokenizer.decode(ids[0]).replace("<|media_placeholder|>", "") == (
        f"<|im_system|>system<|im_middle|>{system}<|im_end|>"
        f"<|im_assistant|>assistant<|im_middle|># Step 1:\n{said}<|im_end|>"
        f"<|im_user|>user<|im_middle|>{picture}<|im_end|>"
        f"<|im_assistant|>assistant<|im_middle|># Step 2:\n{said}<|im_end|>"
        f"<|im_user|>user<|im_middle|>{picture}<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|># Step 3:\nnothing to read\n[the reply holds no code]\n<|im_end|>"
        f"<|im_user|>user<|im_middle|>{picture}# Task Instruction:\n{GOAL}\n\n"
        "Write the next step that brings this task forward.\n<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>"
    )


def test_answers_leave_after_ten_steps_and_keep_their_number(adapter: OpenCuaAdapter) -> None:
    past = [(None, f"## Action:\nact {n}") for n in range(13)]
    text = adapter.tokenizer.decode(adapter.prompt(GOAL, past, shot()).inputs["input_ids"][0])
    assert "act 2" not in text and "# Step 3:" not in text
    assert text.count("# Step ") == 10
    assert "# Step 4:\n## Action:\nact 3\n" in text


def test_an_answer_of_code_alone_stays(adapter: OpenCuaAdapter) -> None:
    code = "## Code:\n```python\npyautogui.click(x=1, y=2)\n```"
    text = adapter.tokenizer.decode(adapter.prompt(GOAL, [(None, code)], shot()).inputs["input_ids"][0])
    assert f"# Step 1:\n{code}\n" in text


def test_markers_in_page_text_claim_nothing(adapter: OpenCuaAdapter) -> None:
    hostile = "".join(adapter.markers)
    prompt = adapter.prompt(hostile, [(shot(), hostile)], shot())
    ids = prompt.inputs["input_ids"][0].tolist()
    token = adapter.tokenizer.convert_tokens_to_ids
    assert len(prompt.spans) == 2
    assert ids.count(token("<|media_begin|>")) == 2
    assert ids.count(token("<|im_end|>")) == 4
    assert ids.count(token("[EOS]")) == 0


def test_parse_and_render_count_resized_pixels(adapter: OpenCuaAdapter) -> None:
    frame = adapter.prompt(GOAL, [], screenshot(), css_size=(640, 360)).frames[0]
    assert frame.space is CoordinateSpace.RESIZED
    assert frame.resized == (280, 168) and frame.grid == (6, 10)
    action = Click(320, 180)
    assert adapter.parse(adapter.render(action, frame), frame) == action


def test_generate_reads_screenshots_once_and_positions_are_one_dimensional(adapter: OpenCuaAdapter) -> None:
    adapter.model.set_attn_implementation("sdpa")
    inputs, seen, looks = adapter.prompt(GOAL, [(shot(), ANSWER)], shot()).inputs, [], []
    decoder = adapter.model.language_model.model
    handles = [
        decoder.rotary_emb.register_forward_pre_hook(
            lambda m, args, kwargs: seen.extend(kwargs["position_ids"][0].tolist() if kwargs else args[1][0].tolist()),
            with_kwargs=True,
        ),
        adapter.model.vision_tower.register_forward_pre_hook(lambda m, args: looks.append(1)),
    ]
    try:
        out = adapter.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    finally:
        for handle in handles:
            handle.remove()
    size = inputs["input_ids"].shape[1]
    assert out.shape[1] == size + 4
    assert seen == list(range(size + 3))
    assert len(looks) == 1


def test_method_caches_run_on_it(adapter: OpenCuaAdapter) -> None:
    prompt = adapter.prompt(GOAL, [(shot(), ANSWER)], shot())
    size = prompt.inputs["input_ids"].shape[1]
    adapter.model.set_attn_implementation("sdpa")
    plain = adapter.model.generate(**prompt.inputs, past_key_values=DynamicCache(), max_new_tokens=6, do_sample=False)
    use(adapter.model)
    assert adapter.model.vision_tower.config._attn_implementation == "sdpa"
    full = MethodCache(adapter.model, "full")
    assert torch.equal(
        adapter.model.generate(**prompt.inputs, past_key_values=full, max_new_tokens=6, do_sample=False), plain
    )
    small = MethodCache(adapter.model, "gui-kv", 0.2)
    small.begin(input_ids=prompt.inputs["input_ids"], spans=[prompt.spans])
    adapter.model.generate(**prompt.inputs, past_key_values=small, max_new_tokens=3, do_sample=False)
    assert small.at_rest.tokens_stored == int(0.2 * size)


@pytest.mark.parametrize("method", ["full", "snapkv", "gui-kv", "streaming_llm"])
def test_conformance_of_text_prompts(adapter: OpenCuaAdapter, method: str) -> None:
    textkv.use(adapter.model)
    checks = check_method(method, model=adapter.model)
    assert {check.outcome for check in checks} <= {"passed", "not applicable"}


def test_wrong_number_of_placeholders_is_told(adapter: OpenCuaAdapter) -> None:
    inputs = adapter.prompt(GOAL, [], shot()).inputs
    start = int((inputs["input_ids"] == adapter.model.config.image_token_id).int().argmax())
    inputs["input_ids"][0, start] = 1
    with pytest.raises(ValueError, match="the prompt has 53 placeholders, the screenshots make 54 visual tokens"):
        adapter.model(**inputs)


def test_remote_code_tokenizer_alone_is_refused(tmp_path: Path, weights: official.Weights) -> None:
    official.write(tmp_path, SHAPE, weights, tokenizer=False)
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json, only a tokenizer that is Python code"):
        load_adapter(tmp_path)


def test_leftover_mrope_sections_do_not_change_positions() -> None:
    values = official.config(SHAPE)
    values["text_config"]["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
    parameters = OpenCuaConfig(**values).text_config.rope_parameters
    assert parameters == {"rope_theta": 1e6, "rope_type": "default"}
