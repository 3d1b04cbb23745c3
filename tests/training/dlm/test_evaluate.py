"""Evaluation: what counts as right, the rows, the command line."""

import json

import pytest
import torch

from dlm.mini import load_mini
from dlm.mini.problems import FIRST_EVALUATION_SEED, make_problem
from training.dlm import evaluate
from training.dlm.evaluate import answers, measure
from training.dlm.feed import STAGES


class Knowing:
    """Answers by the generator's own working; `spoil` makes some answers wrong."""

    def __init__(self, monkeypatch, spoil):
        known = {}
        monkeypatch.setattr(evaluate, "answers", self.answers)
        self.known, self.spoil = known, spoil
        self.config = type("Config", (), {"model_type": "Dream"})()

    def answers(self, model, tokenizer, problems, gen_length):
        return [self.spoil(n, p) for n, p in enumerate(problems)]


def test_only_the_number_counts_and_the_working_is_told_apart(monkeypatch):
    def spoil(number, problem):
        kept = problem.answer
        return [kept, f"=0,0 #### {problem.total}", kept.split("####")[0], f"#### {problem.total + 1}"][number % 4]

    rows = measure(Knowing(monkeypatch, spoil), None, n=40, gen_length=32)
    whole = rows[0]
    assert (whole["task"], whole["n"], whole["accuracy"], whole["working"]) == ("all", 40, 0.5, 0.25)
    assert whole["low"] < 0.5 < whole["high"] and whole["model"] == "dream"
    assert sum(row["n"] for row in rows[1:]) == 40
    assert sum(row["accuracy"] * row["n"] for row in rows[1:]) == pytest.approx(20)


def test_hard_problems_have_their_own_rows(monkeypatch):
    rows = measure(Knowing(monkeypatch, lambda _, problem: problem.answer), None, n=30, gen_length=64, task="hard")
    assert [row["task"] for row in rows] == ["all", "4 steps", "5 steps", "6 steps"]
    assert [row["accuracy"] for row in rows] == [1.0] * 4 and sum(row["n"] for row in rows[1:]) == 30


@pytest.mark.parametrize("kind", ["llada", "dream", "guider"])
def test_a_batch_gives_the_answers_of_its_rows_alone(trainer_of, kind):
    trainer = trainer_of(kind)
    trainer.learn(trainer.feed.batch(0, STAGES[-1]))
    problems = [make_problem(FIRST_EVALUATION_SEED + n, steps=1 + n % 3) for n in range(3)]
    together = answers(trainer.model, trainer.tokenizer, problems, 8)
    alone = [answers(trainer.model, trainer.tokenizer, [p], 8)[0] for p in problems]
    assert together == alone and len(together) == 3


def test_an_answer_ends_at_the_first_end_token(trainer_of, monkeypatch):
    trainer = trainer_of("llada")
    one = trainer.tokenizer("#### 48")["input_ids"]
    written = torch.tensor([[*one, trainer.tokenizer.eos_token_id, *one]])
    monkeypatch.setattr(evaluate, "decode", lambda *args, **kwargs: type("Decoded", (), {"ids": written}))
    assert answers(trainer.model, trainer.tokenizer, [make_problem(1)], len(written[0])) == ["#### 48"]


def test_the_command_writes_rows(trainer_of, tmp_path, capsys):
    trainer_of("llada").save()
    args = ["--model", str(tmp_path / "run" / "latest"), "--n", "3", "--gen-length", "8", "--device", "cpu"]
    evaluate.main([*args, "--json", str(tmp_path / "rows.json")])
    assert "exact answers" in capsys.readouterr().out
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["meta"]["seed"] == FIRST_EVALUATION_SEED and len(written["rows"]) == 4
    assert {"model", "gen_length", "task", "n", "accuracy", "low", "high", "seconds"} <= set(written["rows"][0])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "nowhere"], "no weights in nowhere; train them with"),
        (["--n", "0"], "0 is not a number of questions"),
        (["--gen-length", "0"], "0 is not a number of tokens"),
    ],
)
def test_evaluate_explains_errors(args, message, capsys):
    assert evaluate.main([*args, "--device", "cpu"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_missing_weights_name_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m training.dlm.train --model llada"):
        load_mini(tmp_path)
