"""The five methods on the mini model, and what counts as right."""

import json

import pytest
import torch

from eval.rag import METHODS, Answers, Said, examples, main, right
from textkv.models.loading import load


def test_the_answer_is_looked_for_behind_the_last_step():
    assert right("A was built by B. B was born in Tolm. So the answer is Tolm.", "Tolm") == 1
    assert right("B was born in Tolm. So the answer is Varn.", "Tolm") == 0
    assert right("Tolm.", "Tolm") == 1 and right("Tolmen.", "Tolm") == 0


def test_examples_show_two_facts_each():
    assert examples().count("So the answer is") == 4 and examples().count("[2]") == 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The mini model with random weights: it is unsure of everything, and ends no line."""
    place = tmp_path_factory.mktemp("random")
    trained, tokenizer = load("mini")
    torch.manual_seed(0)
    type(trained)(trained.config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


def test_differences_are_of_the_questions_that_both_answered(tmp_path):
    answers = Answers(tmp_path / "a.jsonl", {})
    for method, rights, searches in (("fixed", (1, 0, 0), (4, 4, 4)), ("atlas-outgoing", (1, 1), (2, 3))):
        for number, (hit, count) in enumerate(zip(rights, searches, strict=True)):
            answers.add(Said(method, number, float(hit), "", ["q"] * count, count, 9, 9, 1.0, {}))
    fixed, atlas = answers.rows(["fixed", "atlas-outgoing"], 9)
    assert fixed["n"] == 3 and "accuracy_change" not in fixed
    assert atlas["accuracy_change"] == 0.5 and atlas["retrievals_change"] == -1.5
    assert atlas["retrievals_change_low"] == -2 and atlas["retrievals_change_high"] == -1


def measured(tmp_path, *more, model="mini"):
    path = tmp_path / "rag.json"
    given = ["--model", model, "--n", "1", "--stories", "4", "--tokens", "10", "--interval", "4", "--json", str(path)]
    return main([*given, *more]), path


def test_a_row_for_each_method_and_a_run_that_goes_on(model, tmp_path, capsys):
    for methods in ("single", ",".join(METHODS)):
        code, path = measured(tmp_path, "--methods", methods, "--theta", "0", model=model)
        assert code == 0
    rows = {row["method"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == list(METHODS)
    assert rows["none"]["retrievals"] == 0 and rows["single"]["retrievals"] == 1
    assert rows["fixed"]["retrievals"] >= 2 and rows["atlas-outgoing"]["theta"] == 0
    assert rows["single"]["retrievals_change"] == 1 - rows["fixed"]["retrievals"] and "accuracy_change" in rows["none"]
    assert "accuracy_change" not in rows["fixed"]
    # Asked once, however often the command is given.
    assert len(path.with_suffix(".jsonl").read_text().splitlines()) == 1 + len(METHODS)
    capsys.readouterr()
    assert measured(tmp_path, "--seed", "4", "--theta", "0", model=model)[0] == 2
    assert "another board" in capsys.readouterr().err


def test_documents_of_the_users_own(tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "a.txt").write_text("The lighthouse of Varn was built by Ilse Korr.")
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"question": "Who built the lighthouse of Varn?", "answer": "Ilse Korr"}\n')
    own = ("--documents", str(folder), "--questions", str(asked), "--methods", "single")
    code, path = measured(tmp_path, *own)
    assert code == 0 and json.loads(path.read_text())["rows"][0]["n"] == 1


@pytest.mark.parametrize("line", ["", "no json\n", '{"question": "Who?"}\n'])
def test_bad_questions_are_one_line(tmp_path, capsys, line):
    (tmp_path / "a.txt").write_text("text")
    asked = tmp_path / "asked.jsonl"
    asked.write_text(line)
    assert measured(tmp_path, "--documents", str(tmp_path), "--questions", str(asked))[0] == 2
    assert measured(tmp_path, "--documents", str(tmp_path))[0] == 2
    said = capsys.readouterr().err
    assert "question" in said and said.count("\n") == 2
