"""The diffusers pipeline and its schedulers: the same tokens as decode(), steps alone, configs on disk, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the pipeline is an optional extra: pip install 'agentkv[pipeline]'")

from diffusers import BlockRefinementScheduler
from diffusers.callbacks import PipelineCallback
from transformers import Qwen2ForCausalLM

from dlm.canvas import Canvas
from dlm.decode import decode
from dlm.mini import load_mini
from dlm.models import DecodingSpec
from dlm.pipeline import MaskedDiffusionPipeline
from dlm.prompts import pad_left
from dlm.schedulers import (
    SCHEDULERS,
    ConfidenceScheduler,
    EntropyScheduler,
    GuidedScheduler,
    ThresholdScheduler,
    UnmaskScheduler,
)
from dlm.unmask import list_rules, resolve_unmask
from tests.dlm import untrained

PROMPTS = ["tom has 37 apples.", "how many pears has ann? she had 20."]
SMALL = {"gen_length": 10, "block_length": 4}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained.make(tmp_path_factory.mktemp("weights"))


def pipe_of(weights: Path, scheduler: object, kind: str = "llada", **more: object) -> MaskedDiffusionPipeline:
    model, tokenizer = load_mini(weights / kind)
    pipe = MaskedDiffusionPipeline(model, scheduler, tokenizer, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same_by_decode(pipe: MaskedDiffusionPipeline, **options) -> torch.Tensor:
    ids, mask = pad_left([pipe.tokenizer(p)["input_ids"] for p in PROMPTS], pipe.tokenizer.pad_token_id)
    return decode(pipe.model, ids, mask, **{**SMALL, "steps": 12, **options}).ids


def test_every_rule_has_a_scheduler_with_its_defaults() -> None:
    assert sorted(SCHEDULERS) == list_rules()
    for name, cls in SCHEDULERS.items():
        if name != "guided":
            assert cls().rule() == resolve_unmask(name)
    assert GuidedScheduler(accept="topk", k=3).rule().acceptance().k == 3


@pytest.mark.parametrize("kind", ["llada", "dream"])
@pytest.mark.parametrize("name", [name for name in sorted(SCHEDULERS) if name != "guided"])
def test_the_pipeline_writes_what_decode_writes(weights: Path, kind: str, name: str) -> None:
    """A ragged batch with a short last block, drawn with a temperature."""
    if (kind, name) == ("dream", "wino"):
        return  # refused, see test_wino
    pipe = pipe_of(weights, SCHEDULERS[name](), kind)
    # What is drawn cannot be guessed, so ssd takes no temperature.
    options = {"cache": "dual"} | ({} if name == "ssd" else {"temperature": 0.8, "top_p": 0.9})
    out = pipe(PROMPTS, num_inference_steps=4, generator=torch.Generator().manual_seed(1), **SMALL, **options)
    same = same_by_decode(pipe, unmask=name, generator=torch.Generator().manual_seed(1), **options)
    assert torch.equal(out.sequences, same)
    assert len(out.texts) == 2 and "</s>" not in "".join(out.texts) and out.stats.forwards > 0


def test_options_of_a_scheduler_reach_its_rule(weights: Path) -> None:
    pipe = pipe_of(weights, ThresholdScheduler(tau=0.05, suppress=[5, 6]))
    out = pipe(PROMPTS, **SMALL, cfg_scale=0.5, eos="fill")
    rule = resolve_unmask("threshold(0.05, suppress=(5, 6))")
    assert torch.equal(out.sequences, same_by_decode(pipe, unmask=rule, steps=None, cfg_scale=0.5, eos="fill"))
    assert out.stats.forwards < 10


def test_guided(weights: Path) -> None:
    guider, _ = load_mini(weights / "guider")
    pipe = pipe_of(weights, GuidedScheduler(chunk=4), guider=guider)
    out = pipe(PROMPTS, **SMALL)
    assert torch.equal(out.sequences, same_by_decode(pipe, unmask="guided(chunk=4)", guide=guider))
    assert out.stats.guider_forwards > 0 and isinstance(pipe.guider, Qwen2ForCausalLM)


def test_save_and_load(weights: Path, tmp_path: Path) -> None:
    guider, tokenizer = load_mini(weights / "guider")
    scheduler = GuidedScheduler(accept="topk", k=2, suppress=(4,))
    pipe = pipe_of(weights, scheduler, guider=guider, guider_tokenizer=tokenizer)
    pipe.save_pretrained(tmp_path / "pipe")
    again = MaskedDiffusionPipeline.from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    assert type(again.model) is type(pipe.model) and again.scheduler.rule() == scheduler.rule()
    assert torch.equal(again(PROMPTS, **SMALL).sequences, pipe(PROMPTS, **SMALL).sequences)
    bare = MaskedDiffusionPipeline(pipe.model, ConfidenceScheduler())
    bare.save_pretrained(tmp_path / "bare")
    assert MaskedDiffusionPipeline.from_pretrained(tmp_path / "bare").tokenizer is None


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_configs_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    options = {"suppress": (3, 4), "logits_eos_inf": True}
    options |= {
        "threshold": {"tau": 0.5},
        "entropy": {"alg_temp": 0.5, "compat": True},
        "guided": {"window": None},
    }.get(name, {})
    scheduler = SCHEDULERS[name](**options)
    scheduler.save_pretrained(tmp_path)
    again = SCHEDULERS[name].from_pretrained(tmp_path)
    assert isinstance(again, UnmaskScheduler) and again.rule() == scheduler.rule() != SCHEDULERS[name]().rule()


def test_a_config_that_cannot_be_is_refused_when_built() -> None:
    with pytest.raises(ValueError, match="tau=-1 is not in"):
        ThresholdScheduler(tau=-1)
    with pytest.raises(ValueError, match="accept='maybe' is not known"):
        GuidedScheduler(accept="maybe")


def test_steps_alone_are_the_rule() -> None:
    """Six masks in three steps: two tokens a step, the surest first; mask and suppressed tokens are never drawn."""
    scheduler, mask = ConfidenceScheduler(suppress=(4,)), 7
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == [2, 1, 0]
    logits = torch.zeros(2, 6, 8)
    logits[:, torch.arange(6), torch.arange(6) % 3] = torch.tensor([6.0, 1, 5, 2, 4, 3])
    logits[..., [4, mask]] = 9.0
    sample = torch.full((2, 6), mask)
    rows = []
    for step in range(3):
        out = scheduler.step(logits, step, sample, mask_token_id=mask)
        assert torch.equal(out.prev_sample != sample, out.transfer_index)
        sample = out.prev_sample
        rows.append(out.transfer_index[1].nonzero()[:, 0].tolist())
    assert rows == [[0, 2], [4, 5], [1, 3]] and sample.tolist() == [[0, 1, 2, 0, 1, 2]] * 2
    again = scheduler.step(logits, 0, torch.full((2, 6), mask), mask_token_id=mask, return_dict=False)
    assert [x.shape for x in again] == [(2, 6)] * 3 and int((again[0] != mask).sum()) == 4


def test_steps_alone_equal_the_unmasker() -> None:
    """Dream's timestep schedule, which counts: step by step the same as the rule on a canvas."""
    generator = torch.Generator().manual_seed(0)
    scheduler, mask = EntropyScheduler(compat=True), 11
    scheduler.set_timesteps(5)
    sample = torch.full((2, 9), mask)
    canvas = Canvas(sample[:, :0], gen_length=9, block_length=9, mask_id=mask, shift=0)
    rule = resolve_unmask("entropy(compat=True)").begin(canvas, DecodingSpec(mask, (), 0, 0, None, "entropy"), None, 5)
    for step in range(5):
        logits = torch.randn(2, 9, 12, generator=generator)
        slots = rule.candidates(canvas, (torch.zeros(2).long(), torch.full((2,), 9)))
        own = logits.gather(1, slots.clamp(min=0)[..., None].expand(-1, -1, 12))
        choice = rule.choose(own, slots, canvas)
        canvas.commit(slots, choice.tokens, choice.commit)
        sample = scheduler.step(logits, step, sample, mask_token_id=mask).prev_sample
        assert torch.equal(sample, canvas.ids)
    assert not bool((sample == mask).any())


def test_steps_that_cannot_be() -> None:
    sample, logits = torch.full((1, 3), 7), torch.zeros(1, 3, 8)
    scheduler = ConfidenceScheduler()
    with pytest.raises(ValueError, match="`set_timesteps` must be called"):
        scheduler.step(logits, 0, sample, mask_token_id=7)
    with pytest.raises(ValueError, match="`num_inference_steps` must be a number of steps >= 1, got 0"):
        scheduler.set_timesteps(0)
    scheduler.set_timesteps(3)
    for wrong, message in (
        ({"mask_token_id": None}, "`mask_token_id` must be given"),
        ({"timestep": 1}, "`timestep` is 1 for a sample that was not begun"),
        ({"model_output": torch.zeros(1, 2, 8)}, "must have one row for each token of `sample`"),
    ):
        arguments = {"model_output": logits, "timestep": 0, "sample": sample, "mask_token_id": 7} | wrong
        with pytest.raises(ValueError, match=message):
            scheduler.step(**arguments)
    guided = GuidedScheduler()
    guided.set_timesteps(3)
    with pytest.raises(ValueError, match="only inside a pipeline"):
        guided.step(logits, 0, sample, mask_token_id=7)


def test_the_scheduler_of_diffusers_itself(weights: Path) -> None:
    """Above 1 its threshold never holds, and what is left is the even quota by probability: LLaDA's own rule."""
    pipe = pipe_of(weights, BlockRefinementScheduler(threshold=2.0))
    whole = {"gen_length": 8, "block_length": 4, "eos": "none"}
    out = pipe(PROMPTS, num_inference_steps=2, **whole)
    assert torch.equal(out.sequences, same_by_decode(pipe, unmask="confidence", steps=4, **whole))
    assert not bool((out.sequences == pipe.model.decoding_spec.mask_id).any())
    pipe.scheduler = BlockRefinementScheduler(threshold=0.0)
    assert pipe(PROMPTS, **SMALL, eos="none").stats.forwards == 3
    pipe.scheduler = BlockRefinementScheduler(editing_threshold=0.5)
    with pytest.raises(ValueError, match="`scheduler` has editing_threshold=0.5"):
        pipe(PROMPTS, **SMALL)


def test_callbacks(weights: Path) -> None:
    pipe, seen = pipe_of(weights, ConfidenceScheduler()), []
    mask = pipe.model.decoding_spec.mask_id

    def look(pipe: object, step: int, timestep: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append((step, int((tensors["sequences"] == mask).sum()), int(tensors["transfer_index"].sum())))
        return tensors

    names = ["sequences", "transfer_index"]
    watched = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": names}
    out = pipe(PROMPTS[:1], **SMALL, eos="none", **watched)
    assert seen == [(step, 9 - step, 1) for step in range(10)] and out.stats.forwards == 10

    class Seven(PipelineCallback):
        """Writes a 7 into the third place at the first step."""

        tensor_inputs = ["sequences"]

        def callback_fn(self, pipeline, step, timestep, tensors):
            if step == 0:
                tensors["sequences"][:, 2] = 7
            return tensors

    seven = Seven(cutoff_step_ratio=None, cutoff_step_index=0)
    assert pipe(PROMPTS, **SMALL, eos="none", cache="none", callback_on_step_end=seven).sequences[:, 2].tolist() == [
        7,
        7,
    ]
    with pytest.raises(ValueError, match="keys and values of the old ones are cached; use cache='none'"):
        pipe(PROMPTS, **SMALL, callback_on_step_end=seven)


def test_inputs_and_outputs(weights: Path) -> None:
    pipe = pipe_of(weights, ConfidenceScheduler())
    ids, mask = pad_left([pipe.tokenizer(p)["input_ids"] for p in PROMPTS], pipe.tokenizer.pad_token_id)
    text = pipe(PROMPTS, **SMALL)
    sequences, texts = pipe(input_ids=ids, attention_mask=mask, **SMALL, output_type="seq", return_dict=False)
    assert torch.equal(sequences, text.sequences) and texts is None
    assert pipe(PROMPTS[0], gen_length=3).sequences.shape == (1, 3)
    pipe.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    said = pipe(messages=[{"role": "user", "content": PROMPTS[0]}], **SMALL)
    assert torch.equal(said.sequences, pipe(PROMPTS[0], **SMALL, use_chat_template=False).sequences)
    assert torch.equal(said.sequences, pipe(PROMPTS[0], **SMALL).sequences)


WRONG = {
    "two sources": ({"input_ids": torch.ones(1, 2).long()}, "Provide one of `prompt`, `messages`, or `input_ids`"),
    "no source": ({"prompt": None}, "Provide one of `prompt`"),
    "nothing": ({"prompt": []}, "`prompt` is empty"),
    "gen_length": ({"gen_length": 0}, "`gen_length`: gen_length=0"),
    "block_length": ({"block_length": 11}, "`block_length`: block_length=11 is longer"),
    "num_inference_steps": ({"num_inference_steps": 0}, "`num_inference_steps` must be a number of steps per block"),
    "temperature": ({"temperature": -1.0}, "`temperature`: temperature=-1.0"),
    "top_p": ({"top_p": 0.0}, "`top_p`: top_p=0.0"),
    "top_k": ({"top_k": 0}, "`top_k`: top_k=0"),
    "cache": ({"cache": "freecash"}, "`cache`: unknown cache 'freecash'; did you mean freecache"),
    "cfg_scale": ({"cfg_scale": -1}, "`cfg_scale`: cfg_scale=-1"),
    "eos": ({"eos": "halt"}, "`eos`: eos='halt'"),
    "output_type": ({"output_type": "pil"}, "`output_type` must be 'text' or 'seq', got 'pil'"),
    "tensors": (
        {"callback_on_step_end_tensor_inputs": ["block_x"]},
        "`callback_on_step_end_tensor_inputs` has to be in .* but found \\['block_x'\\]",
    ),
    "too long": ({"gen_length": 4000}, "`prompt`: the prompt of 11 tokens and gen_length=4000 need"),
    "mask": ({"prompt": "<mask>"}, "`prompt`: a prompt contains the mask token"),
    "template": ({"prompt": None, "messages": [{"role": "user", "content": "tom"}]}, "no chat template"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused_inputs(weights: Path, name: str) -> None:
    arguments, message = WRONG[name]
    pipe = pipe_of(weights, ConfidenceScheduler())
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": PROMPTS, **SMALL, **arguments})


def test_parts_that_do_not_go_together(weights: Path) -> None:
    guider, _ = load_mini(weights / "guider")
    model, _ = load_mini(weights / "llada")
    with pytest.raises(ValueError, match="`guider` is needed by GuidedScheduler"):
        pipe_of(weights, GuidedScheduler())(PROMPTS, **SMALL)
    with pytest.raises(ValueError, match="`guider` is asked by GuidedScheduler only, not by ConfidenceScheduler"):
        pipe_of(weights, ConfidenceScheduler(), guider=guider)(PROMPTS, **SMALL)
    with pytest.raises(ValueError, match="`tokenizer` is needed for `prompt`"):
        MaskedDiffusionPipeline(model, ConfidenceScheduler())(PROMPTS)
