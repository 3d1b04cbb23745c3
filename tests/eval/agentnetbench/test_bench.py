"""The command on recorded tasks of our own, with the embedded model: answers, resume, scoring again, replay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from agentkv.agent import Decision
from agentkv.eval.agentnetbench.__main__ import main, numbers_of, parser
from agentkv.eval.agentnetbench.bench import OWN, Answer, Answers, Bench, Cell
from agentkv.eval.agentnetbench.figures import replay_rows, rows_of
from agentkv.eval.agentnetbench.records import read
from agentkv.eval.bootstrap import clustered
from agentkv.models import load_adapter
from tests.eval.agentnetbench.sample import FORM, SHELL, write


def run(folder: Path, *more: str) -> tuple[int, dict]:
    code = main(["--data", str(folder), "--json", str(folder / "out" / "a.json"), *more])
    return code, json.loads((folder / "out" / "a.json").read_text()) if code == 0 else {}


def test_brief_leaves_single_tasks_out(tmp_path: Path) -> None:
    folder = write(tmp_path, FORM, SHELL)
    whole, brief = (run(folder, "--replay", *more)[1]["rows"] for more in ([], ["--brief"]))
    assert brief == [row for row in whole if row["task"] == "all"] and len(brief) < len(whole)


def rows_at(found: dict, **wanted: object) -> list[dict]:
    return [row for row in found["rows"] if all(row.get(name) == value for name, value in wanted.items())]


def test_a_replay_needs_neither_model_nor_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, FORM, SHELL)
    (folder / "cut.json").write_text("{")
    for picture in (folder / "images").iterdir():
        picture.unlink()
    code, found = run(folder, "--replay", "--protocol", "v1,v2,gui_kv")
    assert code == 0 and len(rows_at(found, task="all", type="all", method="replay")) == 3
    for row in rows_at(found, task="all", type="all"):
        assert (row["n"], row["unscorable"], row["accuracy_scorable"]) == (11, 1, 1.0)
        assert row["accuracy"] == pytest.approx(10 / 11) and row["low"] < row["accuracy"] < row["high"] <= 1
    assert {row["task"] for row in rows_at(found, type="all")} == {"all", "form", "shell"}
    assert rows_at(found, type="dragto", protocol="v2")[0]["accuracy"] == 1.0
    assert found["meta"]["left_out"] == [capsys.readouterr().err.strip()] and "cut.json" in found["meta"]["left_out"][0]


def test_a_model_answers_every_step_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, FORM)
    (folder / "images" / "form_2.png").unlink()
    options = ("--method", "full,gui-kv", "--budget", "0.4", "--screenshots", "1..2", "--max-new-tokens", "4")
    code, found = run(folder, *options)
    lines = (folder / "out" / "a.jsonl").read_text().splitlines()
    assert code == 0 and len(lines) == 1 + 2 * 2 * 3 and "form step 2: there is no image" in capsys.readouterr().err
    (row,) = rows_at(found, method="gui-kv", task="all", type="all", screenshots=2)
    assert row["budget"] == 0.4 and row["n"] == 3 and row["history"] == "teacher" and 0.38 < row["kv_share"] < 0.43
    for name in ("kv_bytes", "kv_bytes_full", "kv_bytes_peak", "seconds", "prefill_tokens", "tokens_stored"):
        assert row[name] > 0, name
    (full,) = rows_at(found, method="full", task="all", type="all", screenshots=2)
    assert full["budget"] == 1.0 and full["decode_flops_attention"] > row["decode_flops_attention"]
    assert full["decode_flops"] == full["decode_flops_full"] > full["decode_flops_attention"]
    (one,) = rows_at(found, method="full", task="all", type="all", screenshots=1)
    assert one["visual_tokens"] < full["visual_tokens"]
    with Image.open(folder / "out" / "a-v1.png") as picture:
        assert picture.width > 1000
    # What was answered is not asked again, a torn line is; other protocols need no model.
    (folder / "out" / "a.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    code, again = run(folder, *options)
    assert code == 0 and len((folder / "out" / "a.jsonl").read_text().splitlines()) == len(lines)
    code, scored = run(folder, "--rescore", "--model", "nowhere", "--protocol", "v1,v2")
    same = ("method", "task", "type", "accuracy", "n")
    strip = [[row.get(name) for name in same] for row in rows_at(scored, protocol="v1")]
    assert code == 0 and strip == [[row.get(name) for name in same] for row in again["rows"]]
    assert main(["--data", str(folder), "--json", str(folder / "out" / "a.json"), "--history", "own"]) == 2
    assert "another board" in capsys.readouterr().err


class Told:
    """An agent that says what it is told, and keeps what it was shown."""

    def __init__(self, *replies: str) -> None:
        self.replies, self.seen = iter(replies), []

    def start(self, env) -> None:
        """Nothing that it learned."""

    def decide(self, goal, history, screenshot, viewport) -> Decision:
        self.seen.append([(image is not None, text) for image, text in history])
        text, frame = next(self.replies), load_frame(screenshot)
        if text == "refuse":
            raise ValueError("no slot")
        return Decision(text, None, 10, 2, kv_bytes=4, kv_bytes_full=8, kv_bytes_peak=8, frame=frame)


def load_frame(picture: Image.Image):
    return load_adapter("mini").prompt("", (), picture).frames[-1]


@pytest.mark.parametrize("history", ["teacher", OWN])
def test_history_is_the_recordings_or_the_models_own(tmp_path: Path, history: str) -> None:
    tasks, _ = read(write(tmp_path, FORM))
    bench = Bench(tasks, load_adapter("mini"), [Cell("full", "1.0", 2)], history, 8)
    agent = bench.agents["full", "1.0"] = Told("Action: wait()", "no words", "refuse", "Action: finished(content='')")
    answers = Answers(tmp_path / "a.jsonl", {})
    said = [(one.text, [x["type"] for x in one.actions], one.error) for one in bench.run(answers)]
    assert [x[1] for x in said] == [["wait"], [], [], ["terminate"]]
    assert said[0][2] == "" and said[1][2] != "" and said[2][2] == "refused: no slot"
    assert answers.left(tasks[0], bench.cells[0]) == 0
    assert [[shown for shown, _ in past] for past in agent.seen] == [[], [True], [False, True], [False, False, True]]
    words = [text for _, text in agent.seen[-1]]
    if history == OWN:
        assert words == ["Action: wait()", "no words", ""]
    else:
        assert words[0].startswith("Thought: Thought 0\nAction: click(start_box='(")
        assert words[1] == "Thought: Thought 2\nAction: type(content='Ada Lovelace\\n')"
        assert words[2].startswith("Thought: Thought 3\nAction: scroll(start_box=") and "direction='down'" in words[2]
    rows = rows_of(tasks, answers.done.values(), ["v1"])
    assert (rows[0]["accuracy"], rows[0]["n"], rows[0]["unreadable"], rows[0]["refused"]) == (0.25, 4, 1, 1)


def test_released_quirks_count_only_in_their_protocol(tmp_path: Path) -> None:
    tasks, _ = read(write(tmp_path, FORM, SHELL))
    keys = [{"type": "hotkey", "keys": ["ctrl", "v"]}]
    answers = [Answer("full", "1.0", 1, "shell", 0, "", keys, grammar) for grammar in ("UI-TARS", "OpenCUA")]
    found = [rows_of(tasks, [answer], ["v1", "gui_kv"]) for answer in answers]
    assert [[row["accuracy"] for row in rows if row["task"] == "shell"] for rows in found] == [[1.0, 0.0], [1.0, 1.0]]
    assert replay_rows(tasks, ["gui_kv"])[0]["accuracy_scorable"] == 1.0


def test_cells_of_one_budget_are_compared_step_by_step(tmp_path: Path) -> None:
    tasks, _ = read(write(tmp_path, FORM, SHELL))
    keys = [{"type": "hotkey", "keys": ["ctrl", "v"]}]
    cells = [("gui-kv", "0.2", keys), ("snapkv", "0.2", []), ("h2o", "0.1", []), ("full", "0.2", keys)]
    answers = [Answer(method, budget, 1, "shell", 0, "", said, "OpenCUA") for method, budget, said in cells]
    all_tasks = [row for row in rows_of(tasks, answers, ["v1"]) if row["task"] == row["type"] == "all"]
    assert [row.get("against") for row in all_tasks] == [None, "gui-kv", None, "gui-kv"]
    assert [row.get("change") for row in all_tasks] == [None, -1.0, None, 0.0]
    assert all_tasks[1]["change_low"] == -1.0 and all_tasks[3]["change_low"] == -1.0  # of one step nothing is sure


def test_intervals_resample_tasks() -> None:
    mean, low, high = clustered([[1.0] * 5, [0.0] * 5] * 10)
    assert mean == 0.5 and 0.2 < low < 0.35 and 0.65 < high < 0.8
    assert clustered([[0.0, 1.0, 1.0, 1.0], [0.0]])[0] == pytest.approx(0.6)
    assert clustered([[1.0] * 30]) == (1.0, 0.9, 1.0) and clustered([[1.0] * 50, [1.0] * 50])[1] == 0.0
    assert clustered([]) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--method", "gui-kw"], "did you mean gui-kv"), (["--budget", "40"], "use 0.4"), (["--budget", ""], "names"),
     (["--screenshots", "0"], "at least"), (["--screenshots", "many"], "1..5"), (["--protocol", "v3"], "v1, v2"),
     (["--max-new-tokens", "0"], "not a number of tokens"), (["--model", "/nowhere/at/all"], "nowhere"),
     (["--rescore"], "without --rescore")],
)  # fmt: skip
def test_bad_requests_are_one_line(tmp_path: Path, options: list[str], said: str, capsys) -> None:
    folder = write(tmp_path, FORM)
    assert run(folder, *options)[0] == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("eval.agentnetbench: ") and error.count("\n") == 1


def test_numbers_and_protocols(tmp_path: Path) -> None:
    assert numbers_of("1..3,5,2") == (1, 2, 3, 5)
    assert parser().parse_args(["--data", str(tmp_path)]).protocol == ["v1"]


@pytest.mark.parametrize(("method", "asked"), [("star-kv", 3), ("star-kv-official", 1), ("snapkv", 1)])
def test_a_method_that_remembers_lives_through_a_task_again(tmp_path: Path, method: str, asked: int) -> None:
    tasks, _ = read(write(tmp_path, FORM))
    cell, reply = Cell(method, "0.5", 2), "Action: wait()"

    def answer(file: str, times: int) -> tuple[Told, list[Answer]]:
        bench = Bench(tasks, load_adapter("mini"), [cell], OWN, 8)
        agent = bench.agents[method, "0.5"] = Told(*[reply] * times)
        return agent, list(bench.run(Answers(tmp_path / file, {})))

    whole, answers = answer("whole.jsonl", 4)
    # All but the third step were answered before.
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    left = [line for line in lines if json.loads(line).get("step") != answers[2].step]
    (tmp_path / "part.jsonl").write_text("".join(left))
    again, more = answer("part.jsonl", asked)
    assert [one.step for one in more] == [answers[2].step]
    assert again.seen == whole.seen[3 - asked : 3]
