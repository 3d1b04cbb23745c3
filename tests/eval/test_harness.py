"""The harness's tasks under a cache method: tasks of our own on disk, an untrained model, no network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra `harness`")

from agentkv.eval import harness  # noqa: E402
from agentkv.eval.textbench import load_text_model  # noqa: E402
from textkv.mini.filler import sentences  # noqa: E402
from training.export import export  # noqa: E402
from training.text.shape import fresh_model  # noqa: E402
from training.text.tokenizer import build_tokenizer  # noqa: E402

COMMON = 'dataset_path: json\ntest_split: test\ndoc_to_text: "{{q}}"\ndataset_kwargs: {data_files: {test: %s}}\n'
WRITE = 'task: write\noutput_type: generate_until\ndoc_to_target: "{{a}}"\ngeneration_kwargs: {until: ["."], max_gen_toks: 3}\n'  # noqa: E501
CHOOSE = 'task: choose\noutput_type: multiple_choice\ndoc_to_target: 0\ndoc_to_choice: ["{{a}}", "{{b}}"]\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights in `model`, two tasks beside it."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(" " + " ".join(words) for words in sentences(300, seed=0))
    place = tmp_path_factory.mktemp("harness")
    model = fresh_model(tokenizer)
    export(model, dict(model.named_parameters()), tokenizer, place / "model", {})
    rows = [{"q": "the road was old . " * 20 + "question : the code of falcon is", "a": " amber 47", "b": " olive 12"}]
    data = place / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    (place / "write.yaml").write_text(WRITE + "metric_list: [{metric: exact_match}]\n" + COMMON % data)
    (place / "choose.yaml").write_text(CHOOSE + "metric_list: [{metric: acc}]\n" + COMMON % data)
    return place


def test_two_kinds_of_task_from_command_to_json(folder: Path) -> None:
    out = folder / "out.json"
    argv = ["--model", str(folder / "model"), "--methods", "full,streaming_llm", "--budget", "0.3"]
    argv += ["--tasks", "write,choose", "--include", str(folder), "--json", str(out), "--limit", "1"]
    assert harness.main(argv) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {(row["method"], row["task"]) for row in rows} == {
        (method, task) for method in ("full", "streaming_llm") for task in ("write", "choose")
    }
    for row in rows:
        share = row["kv_bytes"] / row["kv_bytes_full"]
        assert row["n"] == 1 and (share >= 1.0 if row["method"] == "full" else share < 0.35)


def test_scores_with_everything_kept_are_those_of_one_forward(folder: Path) -> None:
    model, tokenizer = load_text_model(str(folder / "model"))
    context, continuation = list(range(5, 45)), [7, 9, 11]
    lm = harness.CachedLM(model, tokenizer, "snapkv", "1.0", 1)
    [(found, _)] = lm._loglikelihood_tokens([(("", ""), context, continuation)], disable_tqdm=True)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([context + continuation]), use_cache=False).logits[0, -4:-1]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum().item()
    assert found == pytest.approx(wanted, abs=1e-4)


def test_unknown_method_is_told_before_anything_loads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.main(["--tasks", "write", "--methods", "snapvk"]) == 2
    assert "did you mean snapkv" in capsys.readouterr().err
