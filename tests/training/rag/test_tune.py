"""Training by rewards: checkpoints are gone on from, a reward that is no number loses nothing, and the command."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl", reason="needs the extra porag: pip install 'agentkv[porag]'")

from textkv.models.loading import load  # noqa: E402 - after the skip
from textkv.rag.heads import FILE, RewardHeads  # noqa: E402
from textkv.rag.rewards import Reward, RewardError  # noqa: E402
from training.rag.data import HELD_OUT, said, tasks  # noqa: E402
from training.rag.measure import measure  # noqa: E402
from training.rag.train import main  # noqa: E402
from training.rag.tune import LATEST, Job, Tuning  # noqa: E402

SMALL = {"prompts": 2, "group": 2, "most": 4, "rank": 2, "save_steps": 1}
ONE_STEP = 1e-6  # seconds


def steps(folder):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [
        (entry["step"], entry["cpu_seconds"])
        for entry in log
        if "plain_reward" in entry or "mean_token_accuracy" in entry
    ]


def trained(folder, seconds=ONE_STEP, reward=None, method="porag", **more):
    model, tokenizer = load("mini")
    return Job(
        method=method, model=model, tokenizer=tokenizer, tasks=tasks("recall", tokenizer, 8, 0),
        tuning=Tuning(seconds=seconds, **SMALL, **more), reward=reward or Reward(), folder=folder,
    ).run()  # fmt: skip


def test_tasks_repeat_and_hold_their_answers():
    _, tokenizer = load("mini")
    for kind in ("recall", "invented"):
        made = tasks(kind, tokenizer, 5, HELD_OUT)
        assert made == tasks(kind, tokenizer, 5, HELD_OUT) != tasks(kind, tokenizer, 5, 0)
        assert all(any(task.reference in passage for passage in task.passages) for task in made)
        assert all(passage in task.prompt for task in made for passage in task.passages)
    assert said(" amber 47 . the code") == "amber 47"
    with pytest.raises(ValueError, match="tasks='x'"):
        tasks("x", tokenizer, 1, 0)


def test_a_training_goes_on_from_its_checkpoint(tmp_path):
    trained(tmp_path)
    assert (tmp_path / LATEST / "adapter_model.safetensors").is_file()
    [(first, used)] = steps(tmp_path)
    again = trained(tmp_path)  # what is done is read, and not trained again
    assert first == 1 and len(steps(tmp_path)) == 1 and again.peft_config["default"].r == SMALL["rank"]
    shutil.rmtree(tmp_path / LATEST)  # as a kill would leave it
    trained(tmp_path, seconds=used + ONE_STEP)
    found = steps(tmp_path)
    assert [step for step, _ in found] == list(range(1, len(found) + 1)) and len(found) > 1
    assert found[0] == (first, used) and found[1][1] > used


def test_a_reward_that_is_no_number_stops_and_keeps_the_steps_before(tmp_path):
    class Breaks(Reward):
        def parts(self, answers, references, passages):
            object.__setattr__(self, "calls", getattr(self, "calls", 0) + 1)
            if self.calls > 1:
                raise RewardError("the reward of 'x' is nan")
            return super().parts(answers, references, passages)

    with pytest.raises(RewardError, match="^the reward of 'x' is nan; step 1 is kept in [^\n]*$"):
        trained(tmp_path, seconds=60.0, reward=Breaks(), heads=True)
    assert {"adapter_model.safetensors", FILE} <= {path.name for path in (tmp_path / "checkpoint-1").iterdir()}


def test_heads_lie_in_every_checkpoint_and_are_gone_on_with(tmp_path, monkeypatch):
    trained(tmp_path, heads=True)
    [(_, used)] = steps(tmp_path)
    shutil.rmtree(tmp_path / LATEST)
    read, load_heads = [], RewardHeads.load
    monkeypatch.setattr(RewardHeads, "load", lambda self, place: read.append(place.name) or load_heads(self, place))
    trained(tmp_path, seconds=used + ONE_STEP, heads=True)
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert read == ["checkpoint-1"] and all(entry["head_error"] > 0 for entry in log if "plain_reward" in entry)
    first, second = (load_file(tmp_path / f"checkpoint-{n}" / FILE) for n in (1, 2))
    assert not torch.equal(first["heads.0.0.weight"], second["heads.0.0.weight"])


def test_supervised_tuning_trains_adapters_alone(tmp_path):
    model, tokenizer = load("mini")
    held = tasks("recall", tokenizer, 4, HELD_OUT)
    before = measure(model, tokenizer, held, Reward(), 4)
    assert before == measure(model, tokenizer, held, Reward(), 4)
    after = trained(tmp_path, method="supervised")
    assert all("lora_" in name for name, p in after.named_parameters() if p.requires_grad)


def test_the_command_measures_once_and_draws(tmp_path, capsys):
    given = ["--seeds", "0", "--seconds", "0.001", "--n", "4", "--prompts", "1", "--group", "2", "--most", "4"]
    given += ["--runs", str(tmp_path / "runs"), "--json", str(tmp_path / "p.json"), "--plot", str(tmp_path / "p.png")]
    for _ in range(2):
        assert main(given) == 0
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["before", "porag", "supervised"]
    assert all(
        0 <= row["exact_match"] <= 1 and row["reward_low"] <= row["reward"] <= row["reward_high"] for row in rows
    )
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    assert main([*given, "--rank", "4"]) == 2
    assert "other settings" in capsys.readouterr().err


class Broken:
    """An embedder that answers with no numbers."""

    def embed(self, texts):
        """NaN for every text."""
        return torch.full((len(texts), 2), float("nan"))


def test_refusals_are_one_line(tmp_path, capsys):
    for given, told in (
        (["--group", "1"], "group=1"),
        (["--methods", "dpo"], "'dpo' is not known"),
        (["--embedder", "nowhere:X"], "No module named"),
        (["--embedder", f"{__name__}:Broken", "--n", "1", "--most", "2"], "is nan; mend the embedder"),
    ):
        assert main([*given, "--runs", str(tmp_path / "runs")]) == 2
        line = capsys.readouterr().err
        assert told in line and line.count("\n") == 1
