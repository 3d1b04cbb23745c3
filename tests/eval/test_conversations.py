"""The board of conversations, on the embedded model: generated talks, files of others, rows, and going on."""

from __future__ import annotations

import json

import pytest

from agentkv.eval import conversations, dialogues
from agentkv.eval.dialogues import Question, Talk
from agentkv.eval.textbench import load_text_model
from textkv.reuse.epicache import Turn

LOCOMO = [
    {
        "sample_id": "conv-1",
        "conversation": {
            "speaker_a": "Ann", "speaker_b": "Ben", "session_1_date_time": "1 May", "session_2_date_time": "2 May",
            "session_10": [{"speaker": "Ben", "dia_id": "D10:1", "text": "Last."}],
            "session_2": [
                {"speaker": "Ann", "dia_id": "D2:1", "text": "Second.", "blip_caption": "a red kite"}
            ],
            "session_1": [{"speaker": "Ann", "dia_id": "D1:1", "text": "First."}],
        },
        "qa": [
            {"question": "When?", "answer": 2022, "evidence": ["D1:1"], "category": 2},
            {"question": "Why?", "adversarial_answer": "no", "evidence": [], "category": 5},
        ],
    }
]  # fmt: skip
LONG_MEM = [
    {
        "question_id": "q1", "question_type": "multi-session", "question": "Where?", "answer": "In the garden",
        "haystack_sessions": [[{"role": "user", "content": "I sit in the garden.", "has_answer": True}],
                              [{"role": "assistant", "content": "Good."}]],
    },
    {"question_id": "q2_abs", "question": "Who?", "answer": "unknown", "haystack_sessions": []},
]  # fmt: skip
SMALL = ["--model", "mini", "--tokens", "256", "--conversations", "1", "--questions", "2", "--block", "48", "--probe"]
SMALL += ["32", "--budgets", "0.25", "--episodes", "2", "--max-new", "3"]


def test_a_generated_talk_is_the_same_every_time_and_holds_its_answers() -> None:
    _, tokenizer = load_text_model("mini")
    talk = dialogues.generate(tokenizer, 512, 0, 8)
    assert talk == dialogues.generate(tokenizer, 512, 0, 8) != dialogues.generate(tokenizer, 512, 1, 8)
    text = [turn.text for turn in talk.turns]
    assert len({question.text for question in talk.questions}) == 8
    for question in talk.questions:
        assert sum(question.answer in line for line in text) == 1 and question.answer not in question.text
    with pytest.raises(ValueError, match="60 tokens for each"):
        dialogues.generate(tokenizer, 100, 0, 8)


def test_files_of_others_are_read(tmp_path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(LOCOMO))
    (talk,) = dialogues.read_talks(path)
    assert talk == Talk(
        (Turn("Ann", "(1 May) First."), Turn("Ann", "(2 May) Second. [shares a red kite]"), Turn("Ben", "Last.")),
        (Question("When?", "2022"),),
    )
    path.write_text(json.dumps(LONG_MEM))
    first, second = dialogues.read_talks(path)
    assert first.turns == (Turn("user", "I sit in the garden."), Turn("assistant", "Good."))
    assert first.questions == (Question("Where?", "In the garden"),) and second.questions == ()
    dated = LONG_MEM[0] | {"haystack_dates": ["2023/05/20", "2023/05/21"], "question_date": "2023/05/30"}
    path.write_text(json.dumps([dated]))
    (talk,) = dialogues.read_talks(path)
    assert [turn.text for turn in talk.turns] == ["(2023/05/20) I sit in the garden.", "(2023/05/21) Good."]
    assert talk.questions[0].text == "Where? (asked on 2023/05/30)"
    silent = LONG_MEM[0] | {"haystack_sessions": [[{"role": "user", "content": None}]]}
    for broken in ("{", '[{"a": 1}]', "7", json.dumps(LOCOMO[0]), json.dumps([silent])):
        path.write_text(broken)
        with pytest.raises(ValueError, match="neither LoCoMo nor LongMemEval"):
            dialogues.read_talks(path)
    for unasked in ([], LONG_MEM[1:], [LONG_MEM[0] | {"answer": None}]):
        path.write_text(json.dumps(unasked))
        with pytest.raises(ValueError, match="no question with an answer"):
            dialogues.read_talks(path)
    path.write_text(json.dumps([LONG_MEM[0] | {"haystack_sessions": []}]))
    with pytest.raises(ValueError, match="nobody says anything in conversation 0"):
        dialogues.read_talks(path)


def test_a_conversation_of_one_turn_does_not_end_the_board(tmp_path) -> None:
    """A share of it is less than the tokens that always stay."""
    short = LONG_MEM[0] | {"haystack_sessions": [[{"role": "user", "content": "hi"}]]}
    (tmp_path / "data.json").write_text(json.dumps([short, *LOCOMO]))
    told = ["--data", str(tmp_path / "data.json"), "--json", str(tmp_path / "rows.json"), "--conversations", "2"]
    assert conversations.main([*SMALL, *told, "--budgets", "0.05", "--methods", "snapkv,epicache"]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["method"], row["n"]) for row in rows] == [("snapkv", 2), ("epicache", 2)]


def test_answers_are_graded_by_digits_or_words() -> None:
    ours = Question("?", "1234", "The number is")
    assert dialogues.graded(" 1234.", ours) == (True, 1.0) and dialogues.graded(" 1235", ours) == (False, 0.75)
    theirs = Question("?", "In the garden")
    assert dialogues.graded("in a garden!", theirs) == (True, 1.0)
    assert dialogues.graded("in my garden", theirs) == (False, pytest.approx(0.8))
    assert dialogues.graded("no", theirs) == (False, 0.0)


def test_rows_of_all_methods_and_going_on(tmp_path, monkeypatch) -> None:
    path = tmp_path / "rows.json"
    assert conversations.main([*SMALL, "--methods", "full,snapkv", "--json", str(path)]) == 0
    known = path.with_suffix(".jsonl").read_text()
    ran: list[str] = []
    answers = conversations.Reader.answers

    def counted(self, method, budget, talk):
        ran.append(method)
        return answers(self, method, budget, talk)

    monkeypatch.setattr(conversations.Reader, "answers", counted)
    assert conversations.main([*SMALL, "--json", str(path)]) == 0
    assert ran == ["window", "epicache"] and path.with_suffix(".jsonl").read_text().startswith(known)
    rows = {row["method"]: row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == {"full", "window", "snapkv", "epicache"}
    for method, row in rows.items():
        assert {"budget", "accuracy", "low", "high", "kv_bytes_peak", "kv_bytes", "tokens"} <= set(row)
        assert row["n"] == 2 and row["kv_bytes_peak"] >= row["kv_bytes"]
        assert method == "full" or row["kv_bytes"] < rows["full"]["kv_bytes"] / 2


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--methods", "snapvk"], "did you mean snapkv"),
        (["--budgets", "40"], "budget=40"),
        (["--conversations", "0"], "--conversations: 0 is not a number of questions"),
        (["--data", "none.json"], "there is no file 'none.json'"),
        (["--episodes", "0"], "--episodes: 0 is not a count"),
        (["--embedder", "no-such"], "no-such"),
    ],
)
def test_requests_that_cannot_be_are_refused(argv, said, capsys, tmp_path) -> None:
    assert conversations.main([*SMALL, "--json", str(tmp_path / "x.json"), *argv]) == 2
    assert said in capsys.readouterr().err
