"""A command without the extra that it needs says what to install in one line, with --help too; all others go on."""

import json
import subprocess
import sys

from textkv._start import EXTRAS, command, missing_extra

from .commands import ELSEWHERE, ROOT, names

# One process for all: the packages of every extra are hidden before anything of ours is imported.
HIDDEN = """
import json, sys
for name in json.loads(sys.argv[1]): sys.modules[name] = None
from importlib import import_module
from pathlib import Path
told = {}
for name in json.loads(sys.argv[2]):
    try:
        import_module(name)
        told[name] = ""
    except Exception as error:
        from textkv._start import missing_extra
        told[name] = missing_extra(error) or f"{type(error).__name__}: {error}"
print(json.dumps(told))
"""


def test_every_command_without_any_extra(reliability):
    modules = {}
    for name in names():
        there = ELSEWHERE.get(name, name)
        modules[f"{there}.__main__" if ROOT.joinpath(*there.split(".")).is_dir() else there] = name
    hidden = [json.dumps([name for name in EXTRAS if name != "accelerate"]), json.dumps(list(modules))]
    run = subprocess.run([sys.executable, "-c", HIDDEN, *hidden], capture_output=True, text=True, cwd=ROOT)
    told = json.loads(run.stdout.strip().splitlines()[-1])
    for module, line in told.items():
        assert not line or "is not installed; pip install 'agentkv[" in line, (module, line)
        outcome = "names the extra, exit 2" if line else "begins without it"
        reliability(7, "extras are not installed", modules[module], outcome)
    assert told["agentkv.run"] and not told["dlm.generate"] and not told["textkv.rag.__main__"]


def test_the_line_and_the_code_of_a_process(reliability):
    code = (
        "import sys; sys.orig_argv = ['python', '-m', 'eval.webtasks', '--help']; sys.modules['playwright'] = None\n"
        "import agentkv.envs"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 2
    assert run.stderr == "eval.webtasks: playwright is not installed; pip install 'agentkv[agents]'\n"
    reliability(7, "extras are not installed", "eval.webtasks --help", "names the extra, exit 2")


def test_only_our_commands_are_told():
    assert command(["python", "-m", "envs.record", "--out", "x"]) == "envs.record"
    assert command(["python", "-X", "dev", "-m", "dlm.generate"]) == "dlm.generate"
    assert command(["python", "-m", "pytest"]) is None and command(["python", "script.py"]) is None
    assert missing_extra(ModuleNotFoundError("x", name="nowhere")) is None and missing_extra(ValueError()) is None
