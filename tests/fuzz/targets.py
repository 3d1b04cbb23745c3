"""What is fuzzed: for each reader how an input is made, how it is read, and what it may raise."""

from __future__ import annotations

import json
import random
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from agentkv.agent import run_episode
from agentkv.eval.agentnetbench import records
from agentkv.grammars import fuzz as grammars
from agentkv.grammars.base import ParseError
from agentkv.reading import read_about, read_steps
from agentkv.spans import find_spans
from agentkv.trace import EpisodeTrace, action_from_dict, action_to_dict, step_to_dict
from dlm.batch import read_done, read_items
from dlm.cache import list_caches, resolve_cache
from dlm.unmask import list_rules, parse_rule
from tests.agentkv.fake_episodes import FakeEnv, FakePolicy, fake_run
from tests.textkv import tiny
from textkv import Budget, MethodCache, list_methods, resolve_method, split_list
from textkv.duo.pattern import Pattern
from textkv.store import FILE, _checksum
from textkv.tri_attention.centres import Centres

from .inputs import bent, edited, mangled, noise, spelled


class Target(ABC):
    """One reader. `batch` inputs are made and read at a time where a file holds many; `share` weighs its part of all
    inputs by what one costs.
    """

    share: ClassVar[float] = 1.0
    batch: ClassVar[int] = 1
    promised: ClassVar[tuple[type[Exception], ...]] = (ValueError,)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    @property
    def name(self) -> str:
        """What it is called in the report."""
        return type(self).__name__

    @abstractmethod
    def make(self, rng: random.Random) -> Any:
        """An input."""

    @abstractmethod
    def read(self, made: Any) -> Any:
        """Read it; what is raised is judged by `promised`."""


class Expressions(Target):
    """Methods, budgets, caches and rules of the command line."""

    share = 1.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.words = [*list_methods(), *list_caches(), *list_rules()]
        self.right = [
            "snapkv(window=8)", "gui-kv(alpha=0,window=4)+adakv(0.2)", "cake+gear(4)", "mikv(16, low=2)", "h2o+adakv",
            "freecache+kivi(4)", "freecache+snapkv(0.4)+suffix(64)", "threshold(0.9)", "full", "minicache(alike=0.8)",
            "turboquant(3)", "0.4", "512t", "1", "full,gui-kv,h2o+adakv", "duo_attention(ratio=0.5)",
        ]  # fmt: skip

    def make(self, rng: random.Random) -> tuple[int, str]:
        """Which parser, and a text."""
        which, kind = rng.choice((0, 0, 0, 1, 1, 2, 3, 4)), rng.random()
        if kind < 0.05:
            return which, noise(rng)
        if which == 1:
            return which, edited(rng, rng.choice(("0.4", "512t", "1", "1e-3")))
        if kind < 0.5:
            return which, edited(rng, rng.choice(self.right), self.words)
        inside = rng.choice(
            ("", "4", "0.5", "window=4", "1, 2", "x", "None", "'a'", "-1", "1e9", "[1]", "*[1]", "**{}")
        )
        return which, edited(rng, f"{rng.choice(self.words)}({inside})", self.words)

    def read(self, made: tuple[int, str]) -> None:
        """Through one parser; what is accepted reads itself."""
        which, text = made
        if which == 0:
            method = resolve_method(text, Budget.parse("0.4"))
            again = resolve_method(method.expression).expression
            if again != method.expression:
                raise AssertionError(f"{method.expression!r} is read as {again!r}")
        elif which == 1:
            budget = Budget.parse(text)
            if Budget.parse(str(budget)) != budget or not 0 <= budget.count(1_000):
                raise AssertionError(f"{budget} does not read itself")
        else:
            (split_list, resolve_cache, parse_rule)[which - 2](text)


def attempt(call: Callable[..., Any], *args: Any) -> None:
    """Call; a ValueError is an answer."""
    try:
        call(*args)
    except ValueError as error:
        one_line(error)


def one_line(error: Exception) -> None:
    """Raise AssertionError for a message that is none."""
    said = str(error)
    if not said.strip():
        raise AssertionError(f"{type(error).__name__} says nothing") from error


class Spans(Target):
    """Placeholders and grids of a prompt."""

    share = 1.0

    def make(self, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Ids, grids and the merge size, mostly near each other."""
        grids = [[rng.choice((1, 1, 1, 2, 0, -1)), rng.choice((2, 4, 6, 3, 0)), rng.choice((2, 4, 8, 1, -2))]
                 for _ in range(rng.randint(0, 3))]  # fmt: skip
        row: list[int] = []
        for t, h, w in grids:
            row += [1] * rng.randint(0, 2) + [9] * max(t * h * w // 4 + rng.choice((0, 0, 0, 1, -1)), 0)
        row += [1] * rng.randint(0, 2)
        rows = rng.choice((1, 1, 1, 2, 0))
        ids = torch.tensor([row] * rows).view(rows, len(row))
        ids = ids[0] if rows and rng.random() < 0.03 else ids
        return ids, torch.tensor(grids).view(-1, 3), rng.choice((2, 2, 2, 1))

    def read(self, made: tuple[torch.Tensor, torch.Tensor, int]) -> None:
        """Spans that are inside and apart."""
        ids, grids, merge = made
        for spans in find_spans(ids, grids, 9, merge):
            for (start, end), (after, _) in zip(spans, [*spans[1:], (ids.shape[1], 0)], strict=True):
                if not 0 <= start < end <= after <= ids.shape[1]:
                    raise AssertionError(f"spans {spans} overlap")


class Lines(Target):
    """A file of prompts, and one of answers to go on with."""

    share, batch = 4.0, 50
    RIGHT: ClassVar[list[Any]] = [
        {"prompt": "What is 2 + 2?"}, {"id": 7, "prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]},
        {"line": 1, "prompt": "a", "settings": "s", "text": "b"}, {"line": 2, "prompt": "a", "settings": "s"},
    ]  # fmt: skip

    def make(self, rng: random.Random) -> list[bytes]:
        """Lines."""
        return [spelled(rng, rng.choice(self.RIGHT)) for _ in range(self.batch)]

    def read(self, made: list[bytes]) -> None:
        """A bad line is an item with its error; answers that are not ours are refused as a whole."""
        path = self.folder / "lines"
        path.write_bytes(b"\n".join(made))
        attempt(read_items, path, True)
        items = read_items(path)
        for item in items:
            json.dumps({"line": item.line, "id": item.id, "prompt": item.prompt, "error": item.error})
        attempt(read_done, path, items, "s")


class Traces(Target):
    """Lines of steps.jsonl and run.json."""

    share = 4.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        steps: list[Any] = []
        trace = EpisodeTrace(folder / "e", {})
        run_episode(FakeEnv(), FakePolicy(share=0.5), 3, on_step=lambda step: steps.append(step_to_dict(step)))
        trace.close()
        self.first = json.loads(json.dumps(steps[0]))
        self.about = json.loads((fake_run(folder / "r", {"full": FakePolicy()}, seeds=1) / "run.json").read_text())
        self.about.pop("meta")

    def make(self, rng: random.Random) -> tuple[bool, bytes]:
        """A line, or the settings."""
        steps = rng.random() < 0.8
        action = action_to_dict(grammars.some_action(rng))
        return steps, spelled(rng, self.first | {"action": action} if steps else self.about)

    def read(self, made: tuple[bool, bytes]) -> None:
        """What is read can be used as what it says it is."""
        steps, data = made
        if not steps:
            (self.folder / "r" / "run.json").write_bytes(data)
            read_about(self.folder / "r")
            return
        (self.folder / "e" / "steps.jsonl").write_bytes(data)
        for step in read_steps(self.folder / "e"):
            json.dumps(step)
            step["action"] and action_from_dict(step["action"])
            for frame in step["frames"]:
                bytes(frame["kept"])


class Recordings(Target):
    """Files in AgentNetBench's layout."""

    share, batch = 3.0, 20
    promised = (ValueError, FileNotFoundError)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        box = {"bboxes": [{"category_id": 1, "rel_bbox": [0.1, 0.1, 0.2, 0.2]}]}
        click = {"type": "click", "params": {"position": {"x": 0.2, "y": 0.2}}, "metadata": box}
        others = [
            {"type": "write", "params": {"content": "a"}},
            {"type": "press", "params": {"keys": ["ctrl", "c"]}},
            {"type": "scroll", "params": {"amount": -3}},
            {"type": "terminate", "params": {"status": "success"}},
        ]
        step = {"step_num": 0, "image": "a.png", "inner_monologue": {"thought": "a"}, "action": "click()"}
        steps = [step | {"ground_truth_actions": [click], "alternative_options": [others]}]
        steps += [step | {"step_num": 1, "ground_truth_actions": others}]
        self.right = {
            "task_id": "t",
            "high_level_task_description": "do it",
            "meta_info": {"system": "Darwin"},
            "steps": steps,
        }

    def make(self, rng: random.Random) -> list[bytes]:
        """Files."""
        return [spelled(rng, self.right | {"task_id": str(number)}) for number in range(self.batch)]

    def read(self, made: list[bytes]) -> None:
        """What is wrong is a line of its own."""
        for number, data in enumerate(made):
            (self.folder / f"{number}.json").write_bytes(data)
        found, problems = records.read(self.folder, self.folder, look=False)
        if any("\n" in line for line in problems):
            raise AssertionError("a problem of more than one line")
        for one in found:
            for step in one.steps:
                json.dumps([step.number, step.thought, [[vars(atom) for atom in option] for option in step.options]])


class Replies(Target):
    """What models say, to each grammar in turn."""

    share = 8.0

    def make(self, rng: random.Random) -> tuple[str, str, Any]:
        """A grammar, a reply and a frame."""
        name, frame = rng.choice(list(grammars.GRAMMARS)), rng.choice(grammars.FRAMES)
        return name, grammars.reply(name, frame, rng), frame

    def read(self, made: tuple[str, str, Any]) -> None:
        """An action or a ParseError, which is a value; an action survives JSON."""
        name, text, frame = made
        found = grammars.GRAMMARS[name].parse(text, frame)
        if isinstance(found, ParseError):
            raise ValueError(grammars.reason_class(found.reason))
        told = json.loads(json.dumps(action_to_dict(found)))
        if action_from_dict(told) != found:
            raise AssertionError(f"{found} came back as another")


class Patterns(Target):
    """Files of gates and of query centres."""

    share = 1.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        Pattern(torch.tensor([[0.0, 1.0], [0.5, 0.2]]), 4, 8, "distillation", "toy", {"steps": 3}).save(
            folder / "p.json"
        )
        self.right = json.loads((folder / "p.json").read_text())
        mini = Centres.load("mini")
        mini.save(folder / "c.safetensors")
        with safe_open(folder / "c.safetensors", "pt") as file:
            self.header = json.loads(file.metadata()["header"])
        self.tensors = {"0.mean": torch.ones(2, 8), "0.lengths": torch.ones(2, 4)}

    def make(self, rng: random.Random) -> tuple[str, Any]:
        """A pattern, a released one, a header of centres, or centres of other shapes."""
        kind = rng.choice(("p.json", "p.json", "p.tsv", "header", "tensors"))
        if kind == "p.json":
            return kind, spelled(rng, self.right)
        if kind == "p.tsv":
            return kind, edited(rng, "0.5\t1.0\n0.25\t0.0\n").encode("utf-8", "replace")
        if kind == "header":
            return kind, spelled(rng, self.header).decode("utf-8", "replace")
        value = rng.choice((1.0, float("nan"), -1.0))
        shapes = [[rng.randint(0, 3) for _ in range(rng.randint(0, 3))] for _ in self.tensors]
        named = [edited(rng, name) for name in self.tensors]
        return kind, {name: torch.full(shape, value) for name, shape in zip(named, shapes, strict=True)}

    def read(self, made: tuple[str, Any]) -> None:
        """Read the file."""
        kind, data = made
        if kind.startswith("p."):
            (self.folder / "config.json").write_text('{"sink_size": 4, "recent_size": 8}')
            (self.folder / kind).write_bytes(data)
            Pattern.load(self.folder / kind).summary()
            return
        header = data if kind == "header" else json.dumps(self.header)
        save_file(
            self.tensors if kind == "header" else data, self.folder / "c.safetensors", metadata={"header": header}
        )
        Centres.load(self.folder / "c.safetensors")


class Saves(Target):
    """Saved caches: bytes that are changed, and headers that are changed with their checksum."""

    share = 0.4
    METHODS: ClassVar[tuple[str, ...]] = ("full", "snapkv", "cake+gear(4)", "streaming_llm", "duo_attention", "kivi")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model, self.saved = tiny.build("llama"), []
        for number, method in enumerate(self.METHODS):
            cache = MethodCache(self.model, method, budget=0.5)
            with torch.no_grad():
                self.model(torch.arange(1, 25)[None], past_key_values=cache, use_cache=True)
            cache.save(folder / str(number))
            path = folder / str(number) / FILE
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                self.saved.append((path.read_bytes(), json.loads(file.metadata()["header"]), tensors))

    def make(self, rng: random.Random) -> tuple[bytes, Any, Any]:
        """Bytes, or a header and tensors."""
        data, header, tensors = rng.choice(self.saved)
        if rng.random() < 0.4:
            return mangled(rng, data), None, None
        tensors = dict(tensors)
        if rng.random() < 0.4 and tensors:
            name = rng.choice(list(tensors))
            one = tensors.pop(name)
            if rng.random() < 0.7:
                others = (one[..., :1].contiguous(), one.double(), one.flatten(), torch.zeros(0), torch.ones(1, 1))
                tensors[name] = rng.choice(others)
        return b"", bent(rng, header) if rng.random() < 0.8 else header, tensors

    def read(self, made: tuple[bytes, Any, Any]) -> None:
        """Load it, and ask what it holds."""
        data, header, tensors = made
        place = self.folder / "x"
        place.mkdir(exist_ok=True)
        if header is None:
            (place / FILE).write_bytes(data)
        else:
            text = json.dumps(header)
            save_file(tensors, place / FILE, metadata={"header": text, "checksum": _checksum(text, tensors)})
        cache = MethodCache.load(place, self.model)
        cache.report()
        cache.get_seq_length()


@contextmanager
def opened(kind: type[Target]) -> Iterator[Target]:
    """A target with a folder of its own, in memory where there is such a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None) as folder:
        yield kind(Path(folder) / "f")
