"""The mini text model: tokenizer, feed, one training step, resume, export, evaluation."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tests.textkv.mini.test_tasks import resolve
from textkv.mini import load_mini
from textkv.mini.facts import TASKS
from textkv.mini.filler import sentences
from textkv.mini.tasks import make_example
from textkv.mini.words import all_words
from training.text import evaluate
from training.text.check import Check, right_answers
from training.text.feed import STAGES, Feed, length_at, longest_at
from training.text.shape import fresh_model
from training.text.tokenizer import build_tokenizer
from training.text.train import TextSettings, TextTrainer

EVALUATION = 1_000_000


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(" " + " ".join(words) for words in sentences(2000, seed=0))


@pytest.fixture
def trainer_of(tmp_path):
    def make(**settings):
        config = {
            "minutes": 1.0,
            "tokens": 256,
            "workers": 0,
            "check_examples": 1,
            "warmup": 2,
            "device": "cpu",
            **settings,
        }
        return TextTrainer(TextSettings(**config), tmp_path)

    return make


def test_every_task_word_is_one_token(tokenizer):
    ids = tokenizer([" " + word for word in all_words()], add_special_tokens=False)["input_ids"]
    assert all(len(one) == 1 for one in ids)
    assert len(tokenizer) <= 2000


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text.encode("utf-8", "replace").decode()


def test_tokenizer_is_the_same_after_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    text = " the code of falcon is amber 47 . Thou art; wörld"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.bos_token_id == tokenizer(text)["input_ids"][0]


@pytest.mark.parametrize("length", [128, 512])
def test_a_batch_marks_exactly_the_answers(tokenizer, length):
    feed = Feed(tokenizer, tokens=4 * length, seed=1)
    batch = feed.batch(np.random.default_rng(0), length)
    assert batch.ids.shape == batch.asks.shape == (4, length)
    assert batch.asks.max() == len(batch.tasks)
    for number, task in enumerate(batch.tasks.tolist()):
        row, at = (batch.asks == number + 1).nonzero(as_tuple=True)
        prompt = tokenizer.decode(batch.ids[row[0], 1 : at[0]].tolist())
        answer = tokenizer.decode(batch.ids[row[0], at].tolist())
        facts, question = prompt.split(" question :", 1)[0], prompt.rsplit(" question :", 1)[1]
        assert answer == resolve(f"{facts} question :{question}", TASKS[task])


def test_batches_do_not_depend_on_the_workers(tokenizer):
    feed = Feed(tokenizer, tokens=256, seed=1, start=5)
    alone = [next(batches).ids for batches in [iter(feed)] for _ in range(4)]
    shared = [
        next(batches).ids for batches in [iter(DataLoader(feed, batch_size=None, num_workers=2))] for _ in range(4)
    ]
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_rows_grow():
    rng = np.random.default_rng(0)
    assert [longest_at(p) for p in (0.0, 0.2, 0.4, 1.0)] == [128, 512, 1024, 3072]
    assert {length_at(rng, 1.0) for _ in range(200)} == {length for _, length in STAGES}


def test_feed_refuses_evaluation_seeds_and_tiny_batches(tokenizer):
    with pytest.raises(ValueError, match="seed=1000000 is not a training seed"):
        Feed(tokenizer, tokens=256, seed=EVALUATION)
    with pytest.raises(ValueError, match="tokens=50 is less than one row"):
        Feed(tokenizer, tokens=50, seed=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"minutes": 0}, "minutes=0 must be positive"), ({"fall": 3.0}, "fall=3.0"), ({"workers": -1}, "workers=-1")],
)
def test_bad_training_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        TextSettings(**wrong)


def test_right_answers_need_every_token():
    asks, targets = torch.tensor([0, 1, 1, 2, 2, 0]), torch.tensor([3, 1, 2, 1, 2, 3])
    logits = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 1, 0, 0]), 4).float()
    assert right_answers(logits, targets, asks, 2).tolist() == [True, False]


def test_steps_lower_the_loss_of_a_fixed_batch(trainer_of):
    trainer = trainer_of()
    batch = Feed(trainer.tokenizer, tokens=512, seed=1).batch(np.random.default_rng(0), 128)
    losses = [trainer.learn(batch)[0].item() for _ in range(6)]
    assert losses[-1] < losses[0] - 0.5


def test_a_resumed_training_goes_on_as_if_never_stopped(trainer_of):
    one = trainer_of()
    batch = Feed(one.tokenizer, tokens=256, seed=1).batch(np.random.default_rng(0), 128)
    one.learn(batch)
    one.seconds = 7.0
    one.save()
    two = trainer_of()
    assert (two.step, two.seconds) == (1, 7.0)
    for trainer in (one, two):
        trainer.learn(batch)
    for (name, a), b in zip(one.model.named_parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(one.average[name], two.average[name]), name


def test_run_saves_exports_and_is_loaded_again(trainer_of, tmp_path, capsys):
    trainer = trainer_of(minutes=0.01)
    trainer.run(report=1)
    out = capsys.readouterr().out
    assert "tokens/s" in out and "held out" in out and "2048: needle" in out
    model, tokenizer = load_mini(tmp_path / "latest")
    assert model.dtype == torch.float32 and not model.training
    assert (tmp_path / "latest" / "model.safetensors").stat().st_size < 16 * 2**20
    assert model.num_parameters() < 4e6
    ids = torch.tensor([tokenizer("some text")["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits
    for name, parameter in trainer.model.named_parameters():
        parameter.data.copy_(trainer.average[name].half().float())
    torch.testing.assert_close(logits, trainer.model(ids).logits.detach(), atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "latest" / "config.json").read_text())["dtype"] == "float32"


def test_start_takes_weights_but_not_the_clock(trainer_of, tmp_path):
    one = trainer_of()
    one.step = 3
    one.save()
    two = TextTrainer(TextSettings(workers=0, device="cpu"), tmp_path / "other", start=tmp_path / "latest")
    assert two.step == 0
    name, weight = next(iter(one.average.items()))
    torch.testing.assert_close(dict(two.model.named_parameters())[name].data, weight, atol=1e-3, rtol=1e-3)


def test_teacher_forcing_and_generation_agree(tokenizer):
    """An untrained model is right nowhere; one that is made to know the answer is right in both measures."""
    torch.manual_seed(0)
    model = fresh_model(tokenizer).eval()
    examples = [make_example("needle", 128, EVALUATION + n, tokenizer) for n in range(2)]
    found = Check(tokenizer, 2, torch.device("cpu"), lengths=(128,)).recall(model, 128)
    assert found[128]["needle"] == np.mean(evaluate.answers(model, examples)) == 0.0
    with torch.no_grad():
        out = model.generate(torch.from_numpy(examples[0].prompt_ids)[None], max_new_tokens=2, do_sample=False)
    known = [type(examples[0])(**{**vars(examples[0]), "answer_ids": out[0, -2:].numpy()})]
    assert evaluate.answers(model, known) == [True]


def test_evaluate_writes_rows(trainer_of, tmp_path, capsys):
    trainer_of().save()
    args = ["--model", str(tmp_path / "latest"), "--lengths", "128", "--n", "2", "--device", "cpu"]
    evaluate.main([*args, "--json", str(tmp_path / "rows.json")])
    assert "needle" in capsys.readouterr().out
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["meta"]["seed"] == EVALUATION and len(written["rows"]) == 3
    assert {"method", "budget", "task", "n", "recall", "low", "high", "seconds"} <= set(written["rows"][0])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--task", "needel"], "did you mean needle"),
        (["--model", "nowhere"], "no weights in nowhere; train them"),
        (["--lengths", "long"], "'long' is not a number of tokens"),
        (["--n", "0"], "0 is not a number of questions"),
    ],
)
def test_evaluate_explains_errors(args, message, capsys):
    assert evaluate.main([*args, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
