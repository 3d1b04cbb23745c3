"""An episode as a GIF and the list of runs: what they show, and that what a run says of itself is text."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from agentkv.envs.actions import Click, Type
from agentkv.reading import read_run
from agentkv.report import gif, runs, write_report
from agentkv.report.gif import GAP, WIDTH, _seen, write_gif
from agentkv.report.runs import write_list
from tests.agentkv.fake_episodes import FakePolicy, fake_run


@pytest.fixture
def run(tmp_path):
    policies = {"full": FakePolicy(), "gui-kv": FakePolicy([Click(3.0, 4.0), Type("<b>x</b>")], share=0.4)}
    return fake_run(tmp_path / "runs" / "a&b", policies, ("click-tab", "memory-code"), needed=3)


def test_a_gif_has_a_picture_per_step_with_all_methods_side_by_side(run, tmp_path):
    with Image.open(write_gif(run, tmp_path / "out" / "x.gif", "memory-code/1000001")) as drawn:
        assert drawn.n_frames == 4 and drawn.width == 2 * WIDTH + GAP and drawn.info["loop"] == 0
        durations = []
        for number in range(drawn.n_frames):
            drawn.seek(number)
            durations.append(drawn.info["duration"])
    assert durations == [1200, 1200, 1200, 3000]


def test_what_was_dropped_lies_under_a_veil(run):
    play = next(x for x in read_run(run).episodes if x["method"] == "gui-kv")
    step = play["steps"][1] | {"action": None}
    Image.new("RGB", (30, 40), "white").save(play["folder"] / step["screenshot"])
    seen, frame = _seen(play, step), step["frames"][-1]
    rows, columns = frame["grid"]
    for place, kept in enumerate(frame["kept"]):
        at = (place % columns + 0.5) * seen.width / columns, (place // columns + 0.5) * seen.height / rows
        assert (seen.getpixel((int(at[0]), int(at[1])))[0] > 200) == (kept == 100)


def test_a_place_that_is_not_there_and_a_trace_that_points_elsewhere_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="no finished episode nowhere/1; there are click-tab/1000000"):
        write_gif(run, tmp_path / "x.gif", "nowhere/1")
    with pytest.raises(ValueError, match=r"holds no run\.json"):
        write_gif(tmp_path, tmp_path / "x.gif")
    path = run / "episodes" / "full" / "click-tab" / "1000000" / "steps.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {"screenshot": "../../000.png"}), *rest]) + "\n")
    # A damaged episode is left out; the others of its task and seed are drawn.
    with Image.open(write_gif(run, tmp_path / "x.gif", "click-tab/1000000")) as drawn:
        assert drawn.width == WIDTH


def test_the_list_has_a_line_for_every_method_of_every_run(run):
    write_report(run)
    other = run.parent / "later"
    other.mkdir()
    (other / "run.json").write_text("<script>")
    page = write_list(run.parent).read_text()
    body = re.search(r"<tbody>(.*)</tbody>", page, re.DOTALL)[1]
    assert page.count("<script") == 0 and "2 runs" in page and body.count("<tr>") == 3
    assert '<a href="a%26b/report.html">a&amp;b</a>' in body and body.count("<a ") == 1
    assert re.search(r"<td>gui-kv</td><td>0.4</td><td>100% .*?<td>40%</td>", body)
    assert "later" in body and "colspan" in body


def test_no_runs_are_told(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        write_list(tmp_path)


def test_a_stranger_keeps_his_files(run, tmp_path, capsys):
    for name in ("x.gif", "runs.html"):
        (run.parent / name).write_text("mine")
    assert gif.main([str(run), str(run.parent / "x.gif")]) == 2
    assert runs.main([str(run.parent)]) == 2
    assert all((run.parent / name).read_text() == "mine" for name in ("x.gif", "runs.html"))
    assert capsys.readouterr().err.count("\n") == 2
    for name in ("x.gif", "runs.html"):
        (run.parent / name).unlink()
    for _ in range(2):
        assert gif.main([str(run), str(run.parent / "x.gif")]) == runs.main([str(run.parent)]) == 0
