"""The study of web tasks: its grid, its figures, and one small study from the command to the curve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from agentkv.eval.paired import difference
from agentkv.eval.webtasks import Study, differences_of, main, rows_of


def study(out: Path, **changes: object) -> Study:
    options = {"tasks": ("click-test", "memory-first"), "methods": ("full", "gui-kv", "snapkv"), "budgets": ("0.4",)}
    options |= {"histories": (1, 5), "episodes": 2, "seed": 1_000_000, "out": out}
    return Study(**(options | changes))


def test_the_full_cache_is_played_once_per_history(tmp_path: Path) -> None:
    grid = study(tmp_path, budgets=("0.4", "64t"))
    names = [(folder.name, plan.methods) for folder, plan in grid.cells()]
    rest = ("gui-kv", "snapkv")
    assert names == [
        ("history-1-full", ("full",)), ("history-1-budget-0.4", rest), ("history-1-budget-64t", rest),
        ("history-5-full", ("full",)), ("history-5-budget-0.4", rest), ("history-5-budget-64t", rest),
    ]  # fmt: skip
    jobs = grid.jobs()
    assert len(jobs) == 6 * 2 * 2
    assert {plan.seeds for _, plan in jobs[:12]} == {(1_000_000,)}, "seeds are outermost"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"methods": ("gui-kw",)}, "did you mean gui-kv"), ({"budgets": ("40",)}, "use 0.4 for 40 %"),
     ({"tasks": ("click-tset",)}, "click-test"), ({"histories": ()}, "at least one"),
     ({"histories": (0,)}, "history=0")],
)  # fmt: skip
def test_bad_requests_are_refused_before_anything_is_played(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study(tmp_path, **change)
    assert not list(tmp_path.iterdir())


def test_differences_use_the_pairing() -> None:
    ours = {("a", seed): seed % 2 == 0 for seed in range(40)}
    theirs = {("a", seed): False for seed in range(20, 60)}
    mean, low, high, n = difference(ours, theirs)
    assert (mean, n) == (0.5, 20) and low < 0.5 < high and low > 0.2
    assert difference(ours, ours) == (0.0, -3 / 40, 3 / 40, 40)
    assert difference(ours, {}) == (0.0, -1.0, 1.0, 0)


@pytest.mark.browser
def test_a_small_study_from_command_to_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--tasks", "click-test,memory-first", "--methods", "full,gui-kv", "--budgets", "0.4", "--history", "5"]
    argv += ["--episodes", "1", "--workers", "1", "--out", str(tmp_path / "s"), "--json", str(tmp_path / "s.json")]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "gui-kv" in said and "curve-history-5.png" in said
    found = json.loads((tmp_path / "s.json").read_text())
    assert "eval.webtasks" in found["meta"]["command"]
    at = {(row["method"], row["task"]): row for row in found["rows"]}
    assert at["full", "all"]["n"] == 2 and at["gui-kv", "memory"]["n"] == at["gui-kv", "memory-first"]["n"] == 1
    assert 0.35 < at["gui-kv", "all"]["kv_share"] < 0.45 < at["full", "all"]["kv_share"]
    assert {row["versus"] for row in found["differences"]} == {"full"}
    with Image.open(tmp_path / "s" / "curve-history-5.png") as picture:
        assert picture.width > 1000
    again = study(tmp_path / "s", methods=("full", "gui-kv"), histories=(5,), episodes=1)
    assert again.jobs() == [] and rows_of(again) == found["rows"] and differences_of(again) == found["differences"]
