"""Each example is run as its reader would run it, and must say what its docstring promises."""

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dlm.mini import WEIGHTS
from tests.eval.agentnetbench.sample import FORM, SHELL, write

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
WORKED = "=7,3 +52 =2'6 -41 =8'4 #### 48"


def said_by(name: str, *options: str) -> list[str]:
    """The lines that an example prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *options]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_a_smaller_cache_answers_like_the_full_one():
    question, *lines = said_by("cache_beside_generate.py")
    wanted = re.search(r"\[(.+)\]$", question)[1]
    held = {}
    for line in lines:
        method, size, answer = re.fullmatch(r"(\S+) +([\d,]+) bytes, +[\d.]+% of full: (.*)", line).groups()
        held[method] = int(size.replace(",", ""))
        assert answer == wanted, line
    assert list(held) == ["full", "snapkv", "kivi(4)"]
    assert held["snapkv"] < 0.25 * held["full"]
    assert held["kivi(4)"] < 0.3 * held["full"]


def test_a_guide_saves_forwards_and_changes_nothing():
    _, alone, cost_alone, guided, cost_guided = said_by("diffusion.py")
    assert (alone, guided) == (f"alone: {WORKED}", f"guided: {WORKED}")
    forwards = [int(re.match(r" +(\d+) forwards", line)[1]) for line in (cost_alone, cost_guided)]
    assert forwards[1] * 4 < forwards[0]


def test_a_folder_of_ones_own_stands_in_for_the_embedded_model():
    _, alone, _ = said_by("diffusion.py", "--model", str(WEIGHTS / "llada"), "--guide", "none")
    assert alone == f"alone: {WORKED}"


@pytest.mark.browser
def test_an_agent_solves_its_task_with_less_than_half_of_the_cache():
    *steps, end = said_by("gui_agent.py")
    shares = [float(re.search(r"\(([\d.]+)% of full\)", line)[1]) for line in steps]
    assert len(steps) > 1 and max(shares) < 45
    assert end.endswith(f"solved in {len(steps)} steps (done)")


@pytest.mark.skipif(find_spec("ray") is None or not os.environ.get("RAY_TESTS"), reason="starts Ray: RAY_TESTS=1")
def test_recorded_tasks_go_from_table_to_table(tmp_path):
    folder, out = write(tmp_path / "data", FORM, SHELL), tmp_path / "answers.parquet"
    lines = said_by("ray_data.py", "--data", str(folder), "--max-new-tokens", "2", "--out", str(out))
    assert [line.partition(" replies")[0].rpartition(" ")[0] for line in lines] == [
        f"{method}: 11 steps answered," for method in ("full", "gui-kv")
    ]
    assert out.stat().st_size > 1000


@pytest.mark.browser
def test_two_agents_read_a_screenshot_once():
    lines = [re.match(r"step \d: (\d+) of (\d+) tokens read, answer (\w+): Action: click", x) for x in
             said_by("shared_screenshot.py")]  # fmt: skip
    read, whole = ([int(line[number]) for line in lines] for number in (1, 2))
    # Two screenshots are read densely and become anchors; of each prompt behind them the last token alone is read.
    assert read == whole[:2] + [2] * 4 and min(whole) > 400
    assert [line[3] for line in lines] == ["unchanged"] * 6


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_takes_a_model(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert '"--model", default="mini"' in text
    assert f"python examples/{path.name}" in ast.get_docstring(ast.parse(text))
