"""GSM8K (arXiv 2110.14168): problems from a JSON-lines file of the published form, prompts, and the exact match.

A line is `{"question": ..., "answer": ...}`; the answer is a worked solution that ends in `#### number`. The data is no
part of this package. Base models need worked problems in front of a question, which must come from another file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from textkv.records import parse, read_text

FINAL = "####"
REQUEST = f"Solve the problem step by step. End with a line that holds only {FINAL} and the number."
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
CALCULATOR = re.compile(r"<<.*?>>")  # the data's notes for a calculator, which nobody reads aloud


@dataclass(frozen=True)
class Question:
    """question: the problem; solution: worked, calculator notes left out; answer: the number."""

    question: str
    solution: str
    answer: Decimal


def read_questions(path: Path) -> list[Question]:
    """The problems in `path`, or in its test.jsonl if it is a folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line of another form; the message has file and line.
    """
    path = path / "test.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; give GSM8K's test.jsonl (openai/grade-school-math) as --data")
    lines = enumerate(read_text(path).splitlines(), 1)
    found = [_question(line, f"{path}:{number}") for number, line in lines if line.strip()]
    if not found:
        raise ValueError(f"{path} has no problems")
    return found


def _question(line: str, where: str) -> Question:
    try:
        value = parse(line)
        question, solution = value["question"].strip(), CALCULATOR.sub("", value["answer"]).strip()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{where} is no problem; a line is {{"question": ..., "answer": ...}}') from error
    if FINAL not in solution or (answer := number_in(solution)) is None:
        raise ValueError(f'{where}: the answer does not end in "{FINAL} number"')
    return Question(question, solution, answer)


def number_in(text: str) -> Decimal | None:
    """The number of an answer: the first behind the last `####`, or else the last of the text; None without any.

    Dollar signs and thousands separators do not count, and neither does what follows the beginning of another problem.
    """
    text = re.split(r"\n\s*Question:", text)[0]
    _, mark, tail = text.rpartition(FINAL)
    found = NUMBER.findall(tail if mark else text)
    if not found:
        return None
    try:
        return Decimal(re.sub(r"[$,]", "", found[0 if mark else -1]))
    except InvalidOperation:
        return None


def prompt(question: Question, shots: Sequence[Question] = (), chat: bool = False) -> str:
    """The text before the answer: worked problems first for a model that continues text, a request for one that chats.

    Args:
        shots: worked problems.
        chat: the text goes into a chat template.
    """
    if chat:
        return f"{question.question}\n\n{REQUEST}"
    worked = "".join(f"Question: {shot.question}\nAnswer: {shot.solution}\n\n" for shot in shots)
    return f"{worked}Question: {question.question}\nAnswer:"


def harness_task(path: Path) -> dict[str, Any]:
    """The problems in `path` as a task of the LM Evaluation Harness, called "gsm8k": exact match of the number.

    Raises:
        FileNotFoundError, ValueError: as `read_questions`.
    """
    read_questions(path)
    file = path / "test.jsonl" if path.is_dir() else path

    def right(doc: dict[str, str], results: list[str]) -> dict[str, float]:
        return {"exact_match": float(number_in(results[0]) == number_in(doc["answer"]))}

    return {
        "task": "gsm8k", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test", "output_type": "generate_until", "process_results": right,
        "doc_to_text": lambda doc: f"Question: {doc['question'].strip()}\nAnswer:",
        "doc_to_target": lambda doc: str(number_in(doc["answer"])),
        "generation_kwargs": {"until": ["Question:"], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
