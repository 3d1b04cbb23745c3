"""What a person can get wrong: one line on stderr that says what to change, exit code 2, nothing played."""

import shutil
from collections import namedtuple

import pytest

from agentkv import run
from textkv.disk import NoSpace

BAD_REQUESTS = [
    (["--method", "gui-kw"], "unknown method 'gui-kw'; did you mean gui-kv"),
    (["--method", ","], "',' names nothing; give one or more"),
    (["--tasks", "click-tap"], "there is no task 'click-tap'; did you mean click-tab"),
    (["--budget", "40"], 'budget=40 is not a fraction; use 0.4 for 40 %, or "40t" for 40 tokens'),
    (["--budget", "0"], "budget=0 is not a fraction; use a share in (0, 1]"),
    (["--budget", "40%"], "budget='40%' is neither a share like 0.4 nor tokens like 512t"),
    (["--episodes", "0"], "argument --episodes: 0 is not a number of episodes; use 1"),
    (["--history", "0"], "argument --history: 0 is not a count; use 1"),
    (["--max-steps", "0"], "argument --max-steps: 0 is not a count; use 1"),
    (["--resume"], "--resume needs --out DIR: the folder of the run to go on with"),
    (["--url", "https://example.com"], "--url and --goal belong together"),
    (["--url", "ftp://example.com", "--goal", "x"], "url='ftp://example.com' cannot be opened; use an address like"),
    (["--url", "file:///not/there.html", "--goal", "x"], "names no file; check the path /not/there.html"),
    (["--url", "https://a.b", "--goal", "x", "--tasks", "click-tab"], "--url and --tasks exclude each other"),
    (["--url", "https://a.b", "--goal", "x", "--allow", "cdn"], "allow='cdn' is not an http(s) origin"),
    (["--device", "cuda:77"], "device 'cuda:77' cannot be used"),
    (["--device", "toaster"], "device 'toaster' cannot be used"),
    (
        ["--chromium", "/not/there"],
        "there is no executable at '/not/there'; install one with `apt-get install chromium`",
    ),
    (["--replay", "nowhere"], "there is no file or folder 'nowhere'"),
]


def refusal(argv, capsys, tmp_path, monkeypatch):
    """The one line that a refused request gets; nothing else has happened."""
    monkeypatch.chdir(tmp_path)
    assert run.main(argv) == 2
    told = capsys.readouterr()
    assert told.err.startswith("agentkv.run: ")
    assert "Traceback" not in told.err and len(told.err.strip().splitlines()) == 1 and told.out == ""
    assert not list(tmp_path.rglob("run.json")), "nothing was begun"
    return told.err


@pytest.mark.parametrize(("argv", "message"), BAD_REQUESTS, ids=[" ".join(argv)[:40] for argv, _ in BAD_REQUESTS])
def test_a_bad_request(argv, message, capsys, tmp_path, monkeypatch):
    assert message in refusal(argv, capsys, tmp_path, monkeypatch)


def test_no_chromium_anywhere(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path))
    monkeypatch.delenv("AGENTKV_CHROMIUM", raising=False)
    assert "no Chromium found" in refusal([], capsys, tmp_path, monkeypatch)


def test_too_little_disk(capsys, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    message = "x: 0 MB free, about 30 MB needed for the traces; free some space"
    assert message in refusal(["--out", "x"], capsys, tmp_path, monkeypatch)


def test_a_disk_that_fills_up(capsys, monkeypatch):
    def full(args, argv):
        raise NoSpace("runs/x: the disk is full; free some space, then --resume goes on")

    monkeypatch.setattr(run, "play_command", full)
    assert run.main([]) == 2
    assert "runs/x: the disk is full" in capsys.readouterr().err


BERT, QWEN = '{"model_type": "bert"}', '{"model_type": "qwen2_5_vl"}'


@pytest.mark.browser
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no config.json; give the folder that holds the model's files"),
        ({"config.json": QWEN}, "has no weights (*.safetensors); download them"),
        ({"config.json": BERT, "model.safetensors": ""}, "is a 'bert' model; supported families: qwen2_5_vl"),
        ({"config.json": QWEN, "model.safetensors": "cut short"}, "model: "),
    ],
    ids=["empty", "no weights", "unsupported", "damaged weights"],
)
def test_a_folder_that_is_no_model(files, message, capsys, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    assert message in refusal(["--model", str(folder)], capsys, tmp_path, monkeypatch)


def test_ctrl_c_before_the_first_step(capsys, monkeypatch):
    def stop(args, argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "play_command", stop)
    assert run.main([]) == 130
    assert capsys.readouterr().err == "agentkv.run: stopped; what was recorded is kept, --resume goes on\n"
