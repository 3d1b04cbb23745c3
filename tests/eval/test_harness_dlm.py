"""Diffusion models in the harness: an untrained one, problems in a file, no network."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `harness`")

from agentkv.eval import harness  # noqa: E402
from agentkv.eval.harness_dlm import DiffusionLM  # noqa: E402
from dlm.config import DecodingConfig  # noqa: E402
from dlm.decode import decode_prompts  # noqa: E402
from dlm.models import answer_text, load_model, text_ids  # noqa: E402
from tests.dlm.untrained import make  # noqa: E402

CONFIG = DecodingConfig(gen_length=12, block_length=4, cache="dual", eos="none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("harness")
    make(place)
    rows = [{"question": f"{n} + 2 =", "answer": f"{n} + 2 = {n + 2}\n#### {n + 2}"} for n in range(3)]
    (place / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def test_gsm8k_from_command_to_json(folder: Path) -> None:
    out = folder / "out.json"
    argv = ["--model", f"dlm:{folder / 'llada'}", "--tasks", "gsm8k", "--data", str(folder), "--batch", "2"]
    argv += ["--methods", "dual+threshold(0.9)", "--gen-length", "8", "--block-length", "4", "--json", str(out)]
    assert harness.main(argv) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in rows] == [
        "none", "dual+threshold(0.9)", "none, fewer steps (4)", "none, fewer steps (2)",
    ]  # fmt: skip
    assert all(row["n"] == 3 and row["metric"] == "exact_match" and row["forwards"] > 0 for row in rows)
    assert rows[1]["query_tokens"] < rows[0]["query_tokens"]


def test_answers_are_those_of_decode_cut_at_the_tasks_stop(folder: Path) -> None:
    model, tokenizer = load_model(folder / "llada")
    texts = ["1 + 2 = ", "40 - 7 = ", "3"]
    done = decode_prompts(model, [text_ids(tokenizer, text) for text in texts], CONFIG)
    whole = [answer_text(tokenizer, row, model.decoding_spec.eos_ids) for row in done.ids.tolist()]
    stop = next(word for text in whole for word in text.split() if word)

    def asked(until: object) -> list[SimpleNamespace]:
        return [SimpleNamespace(args=(text, {"until": until})) for text in texts]

    lm = DiffusionLM(model, tokenizer, CONFIG, batch=2)
    assert lm.generate_until(asked([]), disable_tqdm=True) == whole
    assert lm.totals["query_tokens"] >= done.stats.query_tokens
    cut = lm.generate_until(asked(stop), disable_tqdm=True)
    assert all(stop not in text for text in cut) and any(short != text for short, text in zip(cut, whole, strict=True))


def test_scoring_is_refused_and_a_missing_file_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load_model(folder / "llada")
    with pytest.raises(ValueError, match="has no likelihood of them; use a task of output_type generate_until"):
        DiffusionLM(model, tokenizer, CONFIG).loglikelihood([])
    assert harness.main(["--model", "dlm", "--tasks", "gsm8k", "--data", str(folder / "nothing")]) == 2
    assert "is not there" in capsys.readouterr().err
