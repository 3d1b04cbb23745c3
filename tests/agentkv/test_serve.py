"""The command: what it refuses before a model is loaded, and that it starts, answers and ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from agentkv import serve
from tests.processes import start
from textkv.mini import WEIGHTS
from textkv.serve import ENGINES


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "0"], "not a port"),
        (["--port", "70000"], "not a port"),
        (["--port", "http"], "not a port"),
        (["--memory", "8"], "no size"),
        (["--memory=-1GB"], "no size"),
        (["--memory", "0GB"], "no room"),
        (["--memory", "nanGB"], "no size"),
        (["--budget", "40"], "budget"),
        (["--budget", "nan"], "budget"),
        (["--method", "gui-vk"], "gui-kv"),
        (["--engine", "video"], "video"),
        (["--model", "nowhere"], "nowhere"),
        (["--model", "mini-dlm", "--budget", "0.4"], "cache policy"),
        (["--model", "mini-dlm", "--method", "frecache"], "freecache"),
        (["--model", "mini-dlm", "--method", "block"], "block"),
        (["--model", "mini-dlm", "--memory", "1GB"], "--memory: a diffusion model keeps nothing"),
        (["--model", "mini-dlm", "--memory", "1GB", "--disk", "{folder}"], "keeps nothing"),
        (["--model", "mini-text", "--budget", "0.4"], "without a method"),
        (["--model", "mini-text", "--method", "snapkw", "--budget", "0.4"], "snapkv"),
        (["--model", "mini-text", "--memory", "8KB"], "holds no conversation of 64 tokens with full, which is 132,096"),
        (["--model", "mini-text", "--memory", "1KB", "--method", "minicache"], "holds no conversation of 1 tokens"),
        (["--model", "mini", "--memory", "8KB"], "holds no conversation"),
        (["--model", "mini", "--chat-template", "{template}"], "for text models"),
        (["--model", "{gpt2}"], "no chat template"),
        (["--model", "{gpt2}", "--chat-template", "{template}", "--method", "snapkv"], "a cache that attends"),
        (["--model", "{t5}", "--chat-template", "{template}"], "Unrecognized configuration class"),
        (["--disk", "{folder}"], "no limit"),
        (["--host-memory", "1GB"], "no limit"),
        (["--host-memory", "1"], "no size"),
        (["--queue", "0"], "count"),
        (["--replicas", "2"], "need Ray"),
        (["--rows", "0"], "use 1 to 256"),
        (["--ray", "somewhere"], "no Ray cluster"),
        (["--timeout", "0"], "no time"),
        (["--timeout", "inf"], "finite"),
        (["--max-request", "much"], "no size"),
        (["--device", "cuda:99"], "cuda"),
        (["--api-key-file", "/nowhere"], "no keys"),
        (["--disk", ""], "written"),
        (["--chat-template", "/nowhere"], "no chat template can be read"),
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_a_wrong_request_is_one_line_before_weights_are_read(arguments, says, capsys, monkeypatch, tmp_path):
    for engine in ("text", "vision", "diffusion"):
        monkeypatch.setattr(ENGINES.find(engine), "open", lambda *a, **k: pytest.fail("weights were read"))
    places = {name: tmp_path / name for name in ("folder", "gpt2", "t5", "template")}
    places["template"].write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for kind in (kind for kind in ("gpt2", "t5") if f"{{{kind}}}" in arguments):
        shutil.copytree(WEIGHTS, places[kind])
        config = json.loads((WEIGHTS / "config.json").read_text()) | {"model_type": kind}
        (places[kind] / "config.json").write_text(json.dumps(config))
    assert serve.main(["--port", str(free_port()), *(one.format(**places) for one in arguments)]) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1


def test_a_port_that_is_taken_is_said_before_a_model_is_read(capsys, monkeypatch):
    monkeypatch.setattr("uvicorn.Server.run", lambda *a, **k: pytest.fail("it was served"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert serve.main(["--model", "nowhere", "--port", str(taken.getsockname()[1])]) == 2
    assert "port" in capsys.readouterr().err


def test_an_empty_file_of_keys_is_refused(tmp_path, capsys):
    (tmp_path / "keys").write_text("\n \n")
    assert serve.main(["--api-key-file", str(tmp_path / "keys")]) == 2
    assert "holds no key" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "engine"), [("mini", "vision"), ("mini-text", "text"), ("mini-dream", "diffusion")])
def test_the_engine_follows_from_the_model(model, engine, tmp_path):
    assert serve.engine_of(model) == engine


@pytest.mark.parametrize(
    ("kind", "engine"), [("qwen2_5_vl", "vision"), ("llama", "text"), ("llada", "diffusion"), ("sdar", "diffusion")]
)
def test_a_folder_says_by_its_config_what_it_is(kind, engine, tmp_path):
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    assert serve.engine_of(str(tmp_path)) == engine


def test_it_starts_answers_and_ends(tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "agentkv.serve", "--port", str(port), "--disk", str(tmp_path), "--memory", "1MB"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert f"http://127.0.0.1:{port}/v1 serves mini" in process.stdout.readline()
        for _ in range(200):
            try:
                httpx.get(f"http://127.0.0.1:{port}/health")
                break
            except httpx.ConnectError:
                time.sleep(0.05)
        asked = {"model": "mini", "messages": [{"role": "user", "content": "secret words"}], "max_tokens": 4}
        assert httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=asked, timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode in (0, 143) and "Traceback" not in error
    assert "secret" not in out + error and not list(tmp_path.iterdir())


def test_a_server_that_is_told_to_stop_does_not_wait_for_a_long_answer(tmp_path):
    port = free_port()
    command = start(tmp_path / "c", "agentkv.serve", "--model", "mini-text", "--port", str(port))
    try:
        command.until(lambda: "serves" in command.said)
        asked = {"model": "mini-text", "messages": [{"role": "user", "content": "Once upon a time"}], "stream": True}
        asked |= {"max_tokens": 3900, "temperature": 0}
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/chat/completions", json=asked, timeout=120) as answer:
            next(answer.iter_lines())
            # The answer would take half a minute.
            assert command.send(signal.SIGTERM) == 143 and command.took < 8
        assert command.left() == [] and "Traceback" not in command.told
    finally:
        command.kill()
