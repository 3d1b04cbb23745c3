"""All commands that start a process, a browser, a server, or make a temporary folder, and when they have.

`SOURCES` says of each file that starts something which of these show that it ends. What a command would fetch or
install is played by a program that sleeps.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from eval.peers.place import _READY
from tests.processes import Command, start

PLAYED = "--tasks click-test --episodes 5000"


@dataclass(frozen=True)
class Case:
    """A command: its arguments, and when all that it starts is there.

    Attributes:
        ready: whether it has started what is below it.
        ci: the signal that it meets in CI; None where its start takes too long, or others there start the same things.
        programs: names under which a program that sleeps is found first on the PATH.
        before: makes in its folder what it needs, and gives further environment variables.
        browser: whether it needs a real one.
    """

    args: str
    ready: Callable[[Command], object]
    ci: signal.Signals | None
    programs: tuple[str, ...] = ()
    before: Callable[[Path], dict[str, str]] = field(default=lambda folder: {})
    browser: bool = False

    def begin(self, folder: Path, module: str) -> Command:
        """Start it, and wait until it is ready."""
        folder.mkdir()
        env = self.before(folder)
        if self.programs:
            place = folder / "bin"
            place.mkdir(exist_ok=True)
            for name in self.programs:
                sleeper(place / name)
            env["PATH"] = str(place)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = start(folder, module.partition(",")[0], *self.args.format(port=port).split(), **env)
        try:
            return command.until(lambda: self.ready(command))
        except BaseException:
            # One that does not get ready on a loaded machine must not load it further.
            command.below = command.below or command.children
            command.kill()
            raise


def sleeper(path: Path) -> str:
    """Make a program that does nothing for ten minutes; its path."""
    path.write_text(f"#!/bin/sh\nexec {shutil.which('sleep')} 600\n")
    path.chmod(0o755)
    return str(path)


def sleeps(command: Command) -> bool:
    """The program that sleeps is there."""
    return command.has("600")


def browses(command: Command) -> bool:
    """A browser is there, with a page."""
    return command.has("--type=renderer")


def plays(command: Command) -> bool:
    """An episode has begun in a browser."""
    return browses(command) and any(command.folder.rglob("steps.jsonl"))


def fills(command: Command) -> bool:
    """A temporary folder is there."""
    return bool(command.temporary)


def listens(command: Command) -> bool:
    """It has told its address."""
    return "http://127.0.0.1:" in command.said


def acts(command: Command) -> bool:
    """Ray's daemons and a worker of ours are there."""
    return command.has("raylet") and command.has("_Actor")


def serves(command: Command) -> bool:
    """Ray's daemons are there, and a model behind them."""
    return command.has("raylet") and "serves" in command.said


def peer(folder: Path) -> dict[str, str]:
    """The peer's environment, with a sleeping interpreter."""
    place = folder / "cache" / "agentkv" / "peers" / "kvpress"
    (place / "bin").mkdir(parents=True)
    (place / _READY).touch()
    sleeper(place / "bin" / "python")
    return elsewhere(folder)


def elsewhere(folder: Path) -> dict[str, str]:
    """No packages, models or browsers that were fetched before; and an index of packages that never answers."""
    silent = socket.create_server(("127.0.0.1", 0))
    OPEN.append(silent)
    index = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
    names = {"XDG_CACHE_HOME": folder / "cache", "PLAYWRIGHT_BROWSERS_PATH": folder / "none"}
    found = {name: str(path) for name, path in names.items()}
    return found | {"PIP_INDEX_URL": index, "PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "*", "AGENTKV_CHROMIUM": ""}


def recorded(folder: Path) -> dict[str, str]:
    """A run to draw, and a browser that never answers."""
    from tests.agentkv.fake_episodes import FakePolicy, fake_run

    fake_run(folder / "run", {"full": FakePolicy()}, seeds=1)
    return {"AGENTKV_CHROMIUM": sleeper(folder / "chromium")}


OPEN: list[socket.socket] = []
STOP, END, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
FEW = "--conversations 1 --steps 1 --holds 1 --clients 1 --requests 1 --methods full"
CASES = {
    "agentkv.report.picture": Case("run p.png", sleeps, STOP, before=recorded, browser=True),
    "agentkv.run": Case(f"{PLAYED} --out run", plays, STOP, browser=True),
    "agentkv.serve": Case("--model mini --memory 1GB --disk d --port {port}", listens, STOP),
    "agentkv.serve,ray": Case("--model mini-text --ray local --replicas 1 --port {port}", serves, None),
    "dlm.check_models": Case("", fills, None),
    "envs.install": Case("", sleeps, KILL, ("apt-get", "sudo"), elsewhere, browser=True),
    "envs.oracle": Case("--seeds 5000 --task click-test", browses, None, browser=True),
    "envs.pixels": Case("", browses, None, browser=True),
    "envs.record": Case("--episodes 5000 --out recordings", browses, None, browser=True),
    "envs.shop": Case("--port {port}", listens, STOP),
    "envs.sites,install": Case("install", sleeps, None, ("npm",), elsewhere),
    "envs.sites,serve": Case("serve gentelella --port {port}", listens, STOP),
    "eval.conversations": Case("--model mini --methods epicache --tokens 512 --conversations 50", fills, None),
    "eval.leaderboard": Case(
        "--methods snapkv --budgets 0.5 --length 128 --n 5000 --json b.json",
        # Two workers and multiprocessing's own tracker; a worker that still imports must end too.
        lambda command: len(command.children) > 2, KILL,
    ),
    "eval.leaderboard,ray": Case(
        "--methods full --length 128 --n 5000 --json b.json --workers 1 --ray local", acts, None,
    ),
    "eval.peers,install": Case("install", lambda command: command.has("venv"), STOP, before=elsewhere),
    "eval.peers,compare": Case("compare --n 1 --length 512", sleeps, None, before=peer),
    "eval.persistent": Case("--episodes 40 --methods full --out study", plays, None, browser=True),
    "eval.serving": Case("--conversations 4 --steps 2 --holds 1 --methods full", fills, END),
    "eval.serving,peer": Case(f"{FEW} --peer", lambda command: command.has("transformers"), None),
    "eval.webtasks": Case(
        "--tasks click-test --episodes 40 --methods full --history 1 --workers 1 --out study", plays, END, browser=True
    ),
    "eval.webtasks,ray": Case(
        "--tasks click-test --episodes 40 --methods full --history 1 --workers 1 --ray local --out study",
        lambda command: plays(command) and acts(command), None, browser=True,
    ),
    "textkv.models": Case("install smollm2 --out m", lambda command: command.has("pip"), KILL, before=elsewhere),
    "training.agent.collect": Case("--folder episodes", browses, None, browser=True),
    "training.agent.evaluate": Case("--episodes 5000", browses, None, browser=True),
    "training.agent.keep": Case("--latest none", browses, None, browser=True),
    "training.text.train": Case("--runs r --workers 2", lambda command: len(command.children) > 1, None),
}  # fmt: skip
"""By name; behind a comma is what tells cases of one command apart."""

SOURCES = {
    "agentkv/report/picture.py": "agentkv.report.picture",
    "agentkv/run.py": "agentkv.run",
    "agentkv/serve.py": "agentkv.serve",
    "dlm/check_models.py": "dlm.check_models",
    "envs/browser.py": "agentkv.run",
    "envs/driver.py": "agentkv.report.picture",
    "envs/install.py": "envs.install",
    "envs/oracle.py": "envs.oracle",
    "envs/pixels.py": "envs.pixels",
    "envs/record.py": "envs.record",
    "envs/shop.py": "envs.shop",
    "envs/sites/__main__.py": "envs.sites,serve",
    "envs/sites/packages.py": "envs.sites,install",
    "envs/sites/server.py": "envs.sites,serve",
    "envs/web.py": "agentkv.run",
    "eval/conversations.py": "eval.conversations",
    "eval/peers/compare.py": "eval.peers,compare",
    "eval/peers/place.py": "eval.peers,install",
    "eval/persistent.py": "eval.persistent",
    "eval/serving.py": "eval.serving,peer",
    "eval/webtasks.py": "eval.webtasks",
    "textkv/command/crew.py": "eval.leaderboard",
    "textkv/command/ray_cluster.py": "eval.leaderboard,ray",
    "textkv/models/fetch.py": "textkv.models",
    "textkv/models/install.py": "textkv.models",
    "textkv/serve/folders.py": "agentkv.serve",
    "training/agent/collect.py": "training.agent.collect",
    "training/agent/evaluate.py": "training.agent.evaluate",
    "training/agent/keep.py": "training.agent.keep",
    "training/trainer.py": "training.text.train",
}
OWN = {
    "textkv/command/_guard.py": "tests/textkv/command/test_below.py",
    "textkv/command/_watch.py": "tests/textkv/command/test_below.py",
    "textkv/command/below.py": "tests/textkv/command/test_below.py",
    "textkv/command/results.py": "tests/textkv/command/test_results.py",
    "textkv/command/workers.py": "tests/textkv/command/test_ending.py",
    "textkv/conformance/checks.py": "a library's check, no command",
    "textkv/disk.py": "tests/test_disk.py",
    "textkv/provenance.py": "asks git, five seconds at most",
}
"""Files that start something for others, and where that is shown."""
