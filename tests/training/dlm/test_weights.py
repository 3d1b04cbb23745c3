"""The embedded models answer what their README says."""

from __future__ import annotations

import pytest

from dlm.config import DecodingConfig
from dlm.decode import decode_prompts
from dlm.mini import KINDS, WEIGHTS, load_mini, task_of
from dlm.mini.problems import FIRST_EVALUATION_SEED, final_answer, make_problem
from dlm.models import answer_text
from dlm.prompts import prompt_ids
from dlm.sources import open_guide
from training.dlm.evaluate import measure

MOST_BYTES = 16 * 2**20


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_problems_are_solved(kind: str) -> None:
    hard = task_of(kind) == "hard"
    rows = measure(*load_mini(kind), n=24, gen_length=50 if hard else 64, task=task_of(kind))
    assert rows[0]["accuracy"] >= (0.4 if hard else 0.9)
    assert (WEIGHTS / kind / "model.safetensors").stat().st_size <= MOST_BYTES


@pytest.mark.parametrize("kind", ["llada", "dream"])
@pytest.mark.parametrize("cache", ["none", "freecache"])
def test_a_guide_saves_forwards_and_keeps_answers(kind: str, cache: str) -> None:
    model, tokenizer = load_mini(kind)
    guide = open_guide("mini", "cpu", model.dtype, tokenizer)
    problems = [make_problem(FIRST_EVALUATION_SEED + i) for i in range(8)]
    prompts = [prompt_ids(tokenizer, p.prompt, chat=False) for p in problems]
    done = decode_prompts(model, prompts, DecodingConfig(gen_length=64, cache=cache, guided=True), guide)
    texts = [answer_text(tokenizer, row, model.decoding_spec.eos_ids) for row in done.ids.tolist()]
    assert [final_answer(text) for text in texts] == [p.total for p in problems]
    assert done.stats.forwards <= 8
