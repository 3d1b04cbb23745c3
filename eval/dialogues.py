"""Long conversations with questions about them: generated ones, and those of LoCoMo and LongMemEval files.

A generated conversation goes through topics, one session each. Some turns state a number that is asked for at the very
end, many turns later. Files are JSON as their authors publish them (snap-research/locomo, xiaowu0162/LongMemEval); they
are read, never fetched.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from textkv.records import checked, listed, parse
from textkv.reuse.epicache import Turn

from .ruler import DIGITS, SEED
from .ruler import score as digits_score

BEGUN = "The secret number is"
TOPICS = {
    "animals": "heron otter badger walrus lizard beetle turtle rabbit donkey monkey parrot pigeon camel zebra".split(),
    "cooking": "garlic onion carrot turnip radish spinach lettuce pumpkin melon cherry ginger pepper lemon".split(),
    "tools": "hammer chisel anvil pliers wrench shovel rake ladder bucket saddle wagon bicycle tractor".split(),
    "music": "violin trumpet clarinet guitar piano cymbal tambourine banjo novel poem medal ribbon".split(),
    "space": "comet planet meteor galaxy saturn jupiter neptune rocket telescope antenna compass".split(),
    "clothes": "zipper collar sleeve jacket sweater mitten slipper sandal helmet button pillow blanket".split(),
}
_SAID = (
    "I saw a {a} and a {b} today.",
    "Do you like the {a} more than the {b}?",
    "My {a} reminds me of the {b} that we talked about.",
    "There is nothing better than a {a}, except for a {b}.",
    "Somebody told me a story about a {a} and a {b}.",
    "I would not trade my {a} for any {b}.",
)
_ADVERSARIAL = 5  # LoCoMo's category of questions that have no answer
_SPOKEN, _WRITTEN = {"speaker": str, "text": str}, {"role": str, "content": str}


@dataclass(frozen=True)
class Question:
    """What is asked, its answer, and how the answer begins."""

    text: str
    answer: str
    begun: str = ""


@dataclass(frozen=True)
class Talk:
    """A conversation and the questions at its end."""

    turns: tuple[Turn, ...]
    questions: tuple[Question, ...]


def generate(tokenizer: PreTrainedTokenizerBase, tokens: int, number: int, questions: int = 8) -> Talk:
    """Conversation `number` of about so many tokens: the same arguments, the same conversation.

    Raises:
        ValueError: more questions than a conversation of that length has turns for.
    """
    if questions < 1 or tokens < 60 * questions:
        raise ValueError(f"{questions} questions in {tokens} tokens: give at least 1 question and 60 tokens for each")
    rng = np.random.default_rng([SEED, tokens, number])
    topics = [list(TOPICS)[i] for i in rng.permutation(len(TOPICS))[:4]]
    facts = [_fact(rng, topic, questions, i) for i, topic in zip(range(questions), cycle(topics), strict=False)]
    sessions: list[list[str]] = [[] for _ in topics]
    for i, (line, _) in enumerate(facts):
        sessions[i % len(topics)].append(line)
    size = lambda line: len(tokenizer(f'Ann said, "{line}"\n', add_special_tokens=False)["input_ids"])  # noqa: E731
    room = tokens - sum(size(line) for line, _ in facts)
    for place in cycle(range(len(topics))):
        a, b = rng.choice(TOPICS[topics[place]], 2, replace=False)
        line = str(rng.choice(_SAID)).format(a=a, b=b)
        room -= size(line)
        if room < 0:
            break
        sessions[place].insert(int(rng.integers(len(sessions[place]) + 1)), line)
    said = [line for session in sessions for line in session]
    turns = tuple(Turn("Ben" if i % 2 else "Ann", line) for i, line in enumerate(said))
    return Talk(turns, tuple(question for _, question in facts))


def _fact(rng: np.random.Generator, topic: str, questions: int, number: int) -> tuple[str, Question]:
    # Words by turns, so that no two facts of a topic are about the same thing.
    things = np.random.default_rng([SEED, list(TOPICS).index(topic), questions]).permutation(TOPICS[topic]).tolist()
    thing, answer = things[number // 4 % len(things)], str(rng.integers(10 ** (DIGITS - 1), 10**DIGITS))
    line = f"Remember that the secret number of the {thing} is {answer}."
    return line, Question(f"What is the secret number of the {thing}?", answer, f"The secret number of the {thing} is")


def read_talks(path: Path) -> list[Talk]:
    """The conversations of a LoCoMo or LongMemEval file; questions that have no answer are left out. When a session
    was, and what a picture shows that somebody shares, stands in the turns: there are questions about it.

    Raises:
        ValueError: neither of these formats, a text that is none, or nothing that can be asked.
        OSError: the file cannot be read.
    """
    try:
        items = listed(parse(path.read_bytes()), dict, "the file")
        talks = [_locomo(item) if "conversation" in item else _long_mem_eval(item) for item in items]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is neither LoCoMo nor LongMemEval JSON: {type(error).__name__}: {error}") from None
    if not any(talk.questions for talk in talks):
        raise ValueError(f"{path} has no question with an answer in its {len(talks)} conversations; give another file")
    silent = next((number for number, talk in enumerate(talks) if talk.questions and not talk.turns), None)
    if silent is not None:
        raise ValueError(f"{path}: nobody says anything in conversation {silent}, about which is asked; leave it out")
    return talks


def _locomo(item: dict[str, Any]) -> Talk:
    told = item["conversation"]
    sessions = sorted((int(m[1]), name) for name in told if (m := re.fullmatch(r"session_(\d+)", name)))
    turns: list[Turn] = []
    for _, name in sessions:
        said = [checked(turn, _SPOKEN) for turn in listed(told[name], dict, name)]
        lines = [(x["speaker"], x["text"] + _shown(x.get("blip_caption"))) for x in said]
        turns += _dated(lines, told.get(f"{name}_date_time"))
    asked = [x for x in item["qa"] if x.get("category") != _ADVERSARIAL]
    return Talk(tuple(turns), tuple(q for x in asked for q in _asked(x["question"], x["answer"])))


def _long_mem_eval(item: dict[str, Any]) -> Talk:
    sessions = listed(item["haystack_sessions"], list, "haystack_sessions")
    dates = item.get("haystack_dates") or [None] * len(sessions)
    turns: list[Turn] = []
    for number, (session, date) in enumerate(zip(sessions, dates, strict=True)):
        said = [checked(turn, _WRITTEN) for turn in listed(session, dict, f"session {number}")]
        turns += _dated([(x["role"], x["content"]) for x in said], date)
    if item["question_id"].endswith("_abs"):
        return Talk(tuple(turns), ())
    when = item.get("question_date")
    return Talk(tuple(turns), _asked(item["question"] + (f" (asked on {when})" if when else ""), item["answer"]))


def _dated(lines: list[tuple[str, str]], date: str | None) -> list[Turn]:
    """A session's turns, the first of which says when it was."""
    return [
        Turn(speaker, f"({date}) {text}" if date and not number else text)
        for number, (speaker, text) in enumerate(lines)
    ]


def _shown(caption: str | None) -> str:
    return f" [shares {caption}]" if caption else ""


def _asked(question: str, answer: str | int | float | None) -> tuple[Question, ...]:
    """The question, unless it has no answer."""
    checked({"question": question}, {"question": str})
    return () if answer is None else (Question(question, str(answer)),)


def graded(said: str, question: Question) -> tuple[bool, float]:
    """(right, score in 0..1): by digits where the answer is a number of ours, else by the F1 of words."""
    if question.begun:
        return digits_score(said, question.answer)
    score = word_f1(said, question.answer)
    return score == 1, score


def word_f1(said: str, answer: str) -> float:
    """F1 of the words of two texts, without articles and punctuation, as question answering is scored."""
    ours, theirs = (Counter(_words(text)) for text in (said, answer))
    common = sum((ours & theirs).values())
    if not common:
        return 0.0
    precision, recall = common / sum(ours.values()), common / sum(theirs.values())
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the")]
