"""Training: every model learns a fixed batch, resumes exactly, exports what it averaged, refuses nonsense."""

import json

import pytest
import torch
from transformers import Qwen2ForCausalLM

from dlm.mini import KINDS, load_mini
from dlm.models import DreamModel, LLaDAModelLM
from training.dlm.feed import STAGES, Feed
from training.dlm.shape import fresh_model, mini_config
from training.dlm.tokenizer import build_tokenizer
from training.dlm.train import DlmSettings, main


@pytest.mark.parametrize("kind", KINDS)
def test_steps_lower_the_loss_of_a_fixed_batch(trainer_of, kind):
    trainer = trainer_of(kind, rate=1e-2)
    batch = trainer.feed.batch(0, STAGES[0])
    losses = [trainer.learn(batch).item() for _ in range(12)]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_logits_stand_for_the_slot_that_they_are_compared_with(trainer_of, kind):
    """A diffusion model sees the slot itself or, shifted, the one before it; a guider only what comes before."""
    trainer = trainer_of(kind)
    batch = trainer.feed.batch(0, STAGES[0])
    ids = batch.ids.clone()
    with torch.no_grad():
        before = trainer._logits(ids, batch)
        ids[:, batch.prompt + 2] = trainer.tokenizer.mask_token_id
        changed = (trainer._logits(ids, batch) - before).abs().amax(-1)[0] > 1e-6
    assert before.shape[1] == ids.shape[1] - batch.prompt
    expected = torch.ones_like(changed)
    if kind == "guider":
        expected[:3] = False
    assert torch.equal(changed, expected)
    row = trainer.shift * -1 + batch.prompt
    full = trainer.model(input_ids=ids, attention_mask=batch.visible, position_ids=batch.position_ids).logits
    torch.testing.assert_close(full[:, row], trainer._logits(ids, batch)[:, 0])


@pytest.mark.parametrize("kind", ["llada", "guider"])
def test_a_resumed_training_goes_on_as_if_never_stopped(trainer_of, kind):
    one = trainer_of(kind)
    one.learn(one.feed.batch(0, STAGES[0]))
    one.seconds, one.stage = 7.0, 1
    one.save()
    two = trainer_of(kind)
    assert (two.step, two.seconds, two.stage) == (1, 7.0, 1)
    for trainer in (one, two):
        trainer.learn(trainer.feed.batch(trainer.step, STAGES[1]))
    for (name, a), b in zip(one.model.named_parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(one.average.values(), two.average.values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("kind", "made"), [("llada", LLaDAModelLM), ("dream", DreamModel), ("guider", Qwen2ForCausalLM)]
)
def test_run_saves_and_the_export_is_loaded_again(trainer_of, tmp_path, capsys, kind, made):
    trainer = trainer_of(kind, minutes=1e-4)
    trainer.run(report=1)
    out = capsys.readouterr().out
    assert "min step 1 stage 0 loss" in out and "held out, 1 steps to 39" in out
    model, tokenizer = load_mini(tmp_path / "run" / "latest")
    assert type(model) is made and model.dtype == torch.float32 and not model.training
    for (name, a), b in zip(model.named_parameters(), trainer.average.values(), strict=True):
        torch.testing.assert_close(a, b.half().float(), rtol=0, atol=0, msg=name)
    assert tokenizer.padding_side == "left" and tokenizer("tom has 3")["input_ids"]
    trained = json.loads((tmp_path / "run" / "latest" / "training.json").read_text())
    assert trained["model"] == kind and trained["step"] == trainer.step >= 1
    if kind != "guider":
        assert model.decoding_spec.mask_id == tokenizer.mask_token_id and model.decoding_spec.eos_ids == (
            tokenizer.eos_token_id,
        )
        assert model.decoding_spec.shift == {"llada": 0, "dream": 1}[kind]


def test_a_crash_while_writing_leaves_the_old_state(trainer_of, monkeypatch):
    trainer = trainer_of("llada")
    trainer.save()
    old = trainer.state.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    trainer.step = 5
    with pytest.raises(OSError, match="disk full"):
        trainer.save()
    assert trainer.state.read_bytes() == old


def test_a_solved_stage_is_left(trainer_of, monkeypatch):
    trainer = trainer_of("llada")
    monkeypatch.setattr(trainer, "solved", lambda steps, top: 0.9)
    assert "90 % exact | stage 1" in trainer.check()
    trainer.stage = len(STAGES) - 1
    trainer.check()
    assert trainer.stage == len(STAGES) - 1
    trainer.stage = 0
    monkeypatch.setattr(trainer, "solved", lambda steps, top: 0.5)
    trainer.check()
    assert trainer.stage == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_size(kind):
    model = fresh_model(kind, build_tokenizer())
    assert 2 * model.num_parameters() < 16 * 2**20
    assert model.config.eos_token_id == 1 and model.config.pad_token_id == 0


def test_another_model_in_the_same_folder_is_refused(trainer_of):
    trainer_of("llada").save()
    with pytest.raises(ValueError, match="holds a 'llada' training; use another --runs folder"):
        trainer_of("dream")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "gpt"}, "model='gpt' is not a mini model; use llada, dream, guider"),
        ({"minutes": 0}, "minutes=0 must be positive"),
        ({"fall": 3.0}, "fall=3.0 is not a share"),
        ({"average": 1.0}, "average=1.0 lies outside"),
        ({"check_problems": 0}, "check_problems=0: use at least 1"),
    ],
)
def test_bad_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        DlmSettings(**wrong)


def test_command_line(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "training.dlm.train.DlmTrainer.run", lambda self: seen.update(vars(self.settings), runs=self.runs)
    )
    main(["--model", "dream", "--minutes", "2", "--runs", str(tmp_path), "--rate", "0.001", "--device", "cpu"])
    assert (seen["model"], seen["minutes"], seen["rate"], seen["runs"]) == ("dream", 2.0, 0.001, tmp_path)


def test_config_and_feed_share_the_vocabulary():
    tokenizer = build_tokenizer()
    assert {mini_config(kind, tokenizer).vocab_size for kind in KINDS} == {len(tokenizer)}
    assert Feed(tokenizer, 1056, seed=0).batch(0, STAGES[-1]).ids.max() < len(tokenizer)
