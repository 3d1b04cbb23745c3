"""Everything here that reads JSON from a file, each with a right value, how to write it damaged, and how it is read."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from agentkv.eval.agentnetbench import records as recordings
from agentkv.eval.dialogues import read_talks
from agentkv.eval.gsm8k import read_questions
from agentkv.eval.gui import items
from agentkv.eval.gui.__main__ import BENCHMARKS
from agentkv.eval.masa import _told
from agentkv.eval.outcomes import Outcome, Outcomes
from agentkv.eval.rag import own_questions
from agentkv.reading import read_run
from dlm.batch import read_items
from dlm.mini import WEIGHTS as DLM
from dlm.sources import model_info
from tests.agentkv.fake_episodes import FakePolicy, fake_run
from tests.textkv import tiny
from textkv import MethodCache
from textkv.checkpoints import read_object
from textkv.duo.pattern import Pattern
from textkv.masa.command import main as masa
from textkv.models.atoms import FILE as ATOMS
from textkv.models.atoms import read_atoms
from textkv.rag.documents import Chunk
from textkv.rag.index import Index
from textkv.records import read_results
from textkv.reuse.epicache import snapshots
from textkv.store import FILE, _checksum
from textkv.tri_attention.centres import Centres
from training.agent.episodes import EpisodeStore
from training.export import read_trained
from training.keep import recorded
from training.rag.train import Study, _history
from training.state import load_state, read_counters, save_state


@dataclass(frozen=True)
class Reader:
    """A reader of JSON.

    Attributes:
        right: makes what it needs in a folder; gives the file's path and a right value.
        read: reads the folder. For one whose damage is `local` it gives how many parts were read and the lines told.
        put: writes the bytes to the path; None = as they are.
        text: whether the bytes must be UTF-8, as they become a text in another file.
    """

    right: Callable[[Path], tuple[Path, Any]]
    read: Callable[[Path], Any]
    put: Callable[[Path, bytes], None] | None = None
    local: bool = False
    text: bool = False


READERS: dict[str, Reader] = {}


def reader(name: str, **about: Any) -> Callable[[Callable[[], Iterator]], None]:
    """A reader from a function that gives `right` and `read`, and `put` where that is needed."""

    def add(make: Callable[[], tuple]) -> None:
        READERS[name] = Reader(*make(), **about)

    return add


def file(name: str, value: Any, read: Callable[[Path], Any]) -> tuple[Callable, Callable]:
    """One file, read by its path."""

    def right(folder: Path) -> tuple[Path, Any]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        return folder / name, value

    return right, lambda folder: read(folder / name)


def header_of(path: Path, key: str) -> Any:
    """The JSON in a safetensors file's metadata."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[key])


def put_header(key: str, **more: Callable[[str, dict], str]) -> Callable[[Path, bytes], None]:
    """Writes a header into a safetensors file, and what else its metadata must hold."""

    def put(path: Path, data: bytes) -> None:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        text = data.decode()
        save_file(tensors, path, metadata={key: text} | {name: make(text, tensors) for name, make in more.items()})

    return put


@reader("a saved cache", text=True)
def _():
    def right(folder):
        model = tiny.build("llama")
        cache = MethodCache(model, "snapkv", budget=0.5)
        with torch.no_grad():
            model(torch.arange(1, 25)[None], past_key_values=cache, use_cache=True)
        cache.save(folder)
        return folder / FILE, header_of(folder / FILE, "header")

    def read(folder):
        MethodCache.load(folder, tiny.build("llama")).report()

    return right, read, put_header("header", checksum=_checksum)


@reader("a conversation's snapshots (epicache)")
def _():
    header = {name: ([] if kind is list else {} if kind is dict else 1 if kind is int else "x")
              for name, kind in snapshots._FIELDS.items()}  # fmt: skip

    def right(folder):
        snapshots.write_header(folder, header)
        return folder / snapshots.FILE, json.loads((folder / snapshots.FILE).read_text())

    return right, snapshots.read_header


@reader("an index (textkv.rag)")
def _():
    def right(folder):
        Index([Chunk("a.txt", 0, "one two"), Chunk("a.txt", 8, "three")], "bm25").save(folder)
        return folder / "index.json", json.loads((folder / "index.json").read_text())

    return right, lambda folder: Index.load(folder).search("three")


@reader("a pattern of heads (duo_attention)")
def _():
    def right(folder):
        Pattern(torch.tensor([[0.0, 1.0]]), 4, 8, "distillation", "toy", {"steps": 3}).save(folder / "p.json")
        return folder / "p.json", json.loads((folder / "p.json").read_text())

    return right, lambda folder: Pattern.load(folder / "p.json").summary()


@reader("query centres (tri_attention)", text=True)
def _():
    def right(folder):
        Centres.load("mini").save(folder / "c.safetensors")
        return folder / "c.safetensors", header_of(folder / "c.safetensors", "header")

    return right, lambda folder: Centres.load(folder / "c.safetensors"), put_header("header")


@reader("matrix atoms (textkv.masa)", text=True)
def _():
    def right(folder):
        line = "convert --model mini --atoms 1 --atoms-only --projections q --texts 2 --length 32"
        assert masa([*line.split(), "--out", str(folder)]) == 0
        return folder / ATOMS, header_of(folder / ATOMS, "masa")

    return right, read_atoms, put_header("masa")


@reader("the state of a training", text=True)
def _():
    def made():
        model = torch.nn.Linear(2, 2)
        return model, {name: x.detach().clone() for name, x in model.named_parameters()}

    def right(folder):
        save_state(folder / "s.safetensors", *made(), (), {"model": "a", "step": 1, "seconds": 0.5})
        return folder / "s.safetensors", header_of(folder / "s.safetensors", "counters")

    def read(folder):
        read_counters(folder / "s.safetensors")
        load_state(folder / "s.safetensors", *made(), ())

    return right, read, put_header("counters")


@reader("run.json (agentkv.run)")
def _():
    def right(folder):
        run = fake_run(folder / "r", {"full": FakePolicy()})
        return run / "run.json", json.loads((run / "run.json").read_text())

    return right, lambda folder: read_run(folder / "r")


def _episode(name: str) -> tuple[Callable, Callable]:
    def right(folder):
        run = fake_run(folder / "r", {"full": FakePolicy()})
        path = sorted(run.rglob(name))[0]
        text = path.read_text()
        return path, json.loads(text.splitlines()[0] if path.suffix == ".jsonl" else text)

    def read(folder):
        found = read_run(folder / "r")
        return len(found.episodes), found.damaged

    return right, read


READERS["episode.json (agentkv.run)"] = Reader(*_episode("episode.json"), local=True)
READERS["steps.jsonl (agentkv.run)"] = Reader(
    *_episode("steps.jsonl"), local=True,
    put=lambda path, data: path.write_bytes(b"\n".join([data, *path.read_bytes().split(b"\n")[1:]])),
)  # fmt: skip


@reader("a board's outcomes (eval.board)", local=True)
def _():
    def outcome(first):
        return Outcome("snapkv", "0.5", "fact", "known", first, [True], [1.0], {"kv_bytes": 1.0})

    def right(folder):
        board = Outcomes(folder / "o.jsonl", {"n": 4})
        for first in (0, 2):
            board.add(outcome(first))
        return folder / "o.jsonl", json.loads((folder / "o.jsonl").read_text().splitlines()[1])

    def put(path, data):
        lines = path.read_bytes().splitlines()
        path.write_bytes(b"\n".join([lines[0], data, lines[2], b""]))

    def read(folder):
        return len(Outcomes(folder / "o.jsonl", {"n": 4}).done), None

    return right, read, put


@reader("AgentNetBench (eval.agentnetbench)", local=True)
def _():
    click = {"type": "click", "params": {"position": {"x": 0.2, "y": 0.2}}}
    step = {"step_num": 0, "image": "a.png", "action": "click()", "ground_truth_actions": [click]}
    value = {"task_id": "a", "high_level_task_description": "do", "meta_info": {"system": "Darwin"}, "steps": [step]}

    def right(folder):
        (folder / "b.json").write_text(json.dumps(value | {"task_id": "b"}))
        return folder / "a.json", value

    def read(folder):
        found, told = recordings.read(folder, folder, look=False)
        return len(found), told

    return right, read


@reader("GUI benchmarks (eval.gui)", local=True)
def _():
    value = {"img_filename": "a.png", "instruction": "Click.", "bbox": [1, 1, 4, 4], "data_type": "icon"}

    def right(folder):
        (folder / "images").mkdir()
        Image.new("RGB", (8, 8)).save(folder / "images" / "a.png")
        (folder / "b.json").write_text(json.dumps([value]))
        return folder / "a.json", [value]

    def read(folder):
        found, told = items.read(BENCHMARKS.find("screenspot")(), folder)
        return len(found), told

    return right, read


@reader("prompts (dlm.generate --batch)", local=True)
def _():
    def right(folder):
        return folder / "in.jsonl", {"prompt": "a", "id": 1}

    def put(path, data):
        path.write_bytes(data + b'\n{"prompt": "b"}\n')

    def read(folder):
        found = read_items(folder / "in.jsonl")
        return sum(one.error is None for one in found), [f"in.jsonl: {one.error}" for one in found if one.error]

    return right, read, put


@reader("recorded episodes (training.agent)", local=True)
def _():
    step = {"screen": 0, "answer": "Action: click(start_box='(1,1)')", "asks": [["a", "b", "c"]]}
    value = [{"task": "t", "seed": 0, "goal": "g", "steps": [step]}]

    def save(path, data):
        np.savez(path, screens=np.zeros((1, 4, 4, 3), np.uint8), episodes=data.decode())

    def right(folder):
        save(folder / "b.npz", json.dumps(value).encode())
        return folder / "a.npz", value

    def read(folder):
        made = EpisodeStore(folder)
        made.refresh()
        return len(made), None

    return right, read, save


READERS["recorded episodes (training.agent)"] = Reader(
    **{**vars(READERS["recorded episodes (training.agent)"]), "text": True}
)


@reader("config.json (dlm.generate)")
def _():
    def right(folder):
        shutil.copytree(DLM / "llada", folder / "m")
        return folder / "m" / "config.json", json.loads((folder / "m" / "config.json").read_text())

    return right, lambda folder: model_info(folder / "m", None)


@reader("rewards of a training (training.rag)")
def _():
    def study(folder):
        made = Study.__new__(Study)
        made.args = Namespace(runs=folder, n=1, model="mini")
        made.kind, made.tunings = "recall", {0: SimpleNamespace()}
        return made

    def right(folder):
        place = folder / "seed-0" / "grpo"
        place.mkdir(parents=True)
        about = {"settings": {}, "n": 1, "model": "mini", "tasks": "recall"}
        return place / "row.json", {"about": about, "row": {"n": 1}}

    return right, lambda folder: study(folder).row("grpo", 0)


FIGURES = {"log_history": [{"cpu_seconds": 1.0, "step": 1}]}
RESULTS = {"meta": {"command": "python -m eval.x"}, "rows": [{"a": 1}]}
LOCOMO = {"conversation": {"session_1": [{"speaker": "A", "text": "x"}]}, "qa": [{"question": "q", "answer": "a"}]}
TRAINED = {"step": 1, "seconds": 0.5, "before": {"step": 0, "seconds": 0.0}}
PROBLEM = {"question": "1+1?", "answer": "It is 2.\n#### 2"}
SETTINGS, SCORE = {"settings": {"atoms": 1}}, {"score": 0.5, "rows": []}
CONFIG = {"model_type": "llada", "d_model": 8}
for _name, _made in {
    "a training's log (training.rag)": file("trainer_state.json", FIGURES, lambda path: _history(path.parent)),
    "results that are gone on with": file("r.json", RESULTS, read_results),
    "conversations (eval.conversations)": file("l.json", [LOCOMO], read_talks),
    "problems (eval.decoding)": file("test.jsonl", PROBLEM, read_questions),
    "questions (eval.rag)": file("q.jsonl", {"question": "who?", "answer": "I"}, own_questions),
    "settings of a training (eval.masa)": file("training.json", SETTINGS, lambda path: _told(path.parent)),
    "training.json": file("training.json", TRAINED, lambda path: read_trained(path.parent)),
    "figures of weights (training.keep)": file(
        "evaluation.json", {"score": 0.5, "rows": []}, lambda p: recorded(p.parent)
    ),
    "config.json (agentkv.serve)": file("config.json", CONFIG, read_object),
}.items():
    READERS[_name] = Reader(*_made)
