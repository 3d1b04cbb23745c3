"""Every loader meets every damage of a model's folder: one line that names it, and no weight made up in silence."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from agentkv.models import MINI as AGENT
from agentkv.models import load_adapter
from dlm.mini import WEIGHTS as DLM
from dlm.mini import load_mini as load_dlm_mini
from dlm.models import load_model
from dlm.sources import model_info, open_guide, open_model
from textkv import models
from textkv.checkpoints import check_tensors
from textkv.duo.identify import load_model as load_any
from textkv.masa.command import main as masa
from textkv.mini import WEIGHTS as TEXT
from textkv.mini import load_mini
from textkv.models.embedder import Embedder
from textkv.rag.documents import Chunk
from textkv.rag.index import VECTORS, Index

DIM = 16
SMALL = {"hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def diffusion(folder):
    """As `python -m dlm.generate` does."""
    model_info(folder, None)
    return open_model(folder, "cpu", torch.float32)


def guide(folder):
    """As `--guide FOLDER` is read: all but the weights first."""
    model_info("mini", folder)
    return open_guide(folder, "cpu", torch.float32, model_info("mini", None).tokenizer)


LOADERS = {
    "textkv.mini": (TEXT, load_mini),
    "--model of text commands": (TEXT, models.load),
    "atoms (textkv.masa)": ("atoms", models.load),
    "embedder": ("bert", Embedder.load),
    "textkv.methods.duo_attention": (AGENT, lambda folder: load_any(folder, torch.float32, "cpu")),
    "agentkv.run": (AGENT, load_adapter),
    "dlm.generate": (DLM / "llada", diffusion),
    "dlm.generate, Dream": (DLM / "dream", diffusion),
    "dlm.load_model": (DLM / "llada", load_model),
    "dlm.mini": (DLM / "llada", load_dlm_mini),
    "dlm.mini, guider": (DLM / "guider", load_dlm_mini),
    "--guide": (DLM / "guider", guide),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The folders that are made here, by name: a small sentence embedder, and the text model as atoms."""
    root = tmp_path_factory.mktemp("sources")
    BertModel(BertConfig(vocab_size=4096, **SMALL)).save_pretrained(root / "bert")
    for path in TEXT.glob("tokenizer*"):
        shutil.copy(path, root / "bert")
    line = f"convert --model mini --atoms 1 --reduction 0.1 --texts 4 --length 64 --out {root / 'atoms'}"
    assert masa(line.split()) == 0
    return root


def file_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def changed(folder: Path, change) -> None:
    """Put `change(tensors, name)` in the place of the weights; `name` is one of a layer's matrices."""
    with safe_open(file_of(folder), "pt") as file:
        about = file.metadata()
    tensors = load_file(file_of(folder))
    name = next(name for name in sorted(tensors) if "norm" in name.lower() and tensors[name].ndim == 1)
    change(tensors, name)
    save_file(tensors, file_of(folder), metadata=about)


def poisoned(value):
    def change(tensors, name):
        tensors[name] = tensors[name].clone()
        tensors[name][:3] = value

    return change


def cut(folder):
    whole = file_of(folder).read_bytes()
    file_of(folder).write_bytes(whole[: len(whole) // 2])


def without_tokenizer(folder):
    for path in [*folder.glob("tokenizer*"), *folder.glob("vocab*")]:
        path.unlink()


def other_family(folder):
    (folder / "config.json").write_text(json.dumps(BertConfig(**SMALL).to_dict()))


def without_a_shard(folder):
    """An index of two files, of which one is there."""
    whole, names = file_of(folder), sorted(load_file(file_of(folder)))
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    whole.rename(folder / one)
    about = {"metadata": {}, "weight_map": {name: two if name == names[-1] else one for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(about))


def as_codes(tensors, name):
    tensors[name] = tensors[name].to(torch.int32)


def without_end(folder):
    """More layers than any file could fill, in every part of the config that has some."""
    path = folder / "config.json"
    path.write_text(re.sub(r'"(num_hidden_layers|n_layers)": *\d+', r'"\1": 2000000', path.read_text()))


def of_another(folder):
    """One token more than the model has rows for."""
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text())
    told["model"]["vocab"]["<more>"] = 999_999
    path.write_text(json.dumps(told))


DAMAGE = {
    "an index without one of its files": (without_a_shard, "00002|no weights|no .*safetensors|cannot be|missing"),
    "whole numbers for weights": (lambda f: changed(f, as_codes), "1 weights are no fractions: .*norm.* \\(I32\\)"),
    "layers without end": (without_end, "asks for 2,000,000 layers|2000000|missing"),
    "a tokenizer of another model": (of_another, "1 of its tokens lie beyond"),
    "missing weight": (lambda f: changed(f, lambda t, name: t.pop(name)), "missing"),
    "additional weight": (
        lambda f: changed(f, lambda t, _: t.update(stranger=torch.ones(3))),
        "unknown|missing or not",
    ),
    "weight of another shape": (lambda f: changed(f, lambda t, n: t.update({n: torch.ones(3)})), "shape"),
    "NaN weights": (lambda f: changed(f, poisoned(float("nan"))), "3 weights at .* are not finite: .*norm"),
    "infinite weights": (lambda f: changed(f, poisoned(float("inf"))), "3 weights at .* are not finite: .*norm"),
    "truncated safetensors": (cut, "cannot be read"),
    "empty safetensors": (lambda f: file_of(f).write_bytes(b""), "cannot be read"),
    "no safetensors": (lambda f: file_of(f).unlink(), "no file named|no weights|no .*safetensors|cannot be"),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), "config|JSON|model"),
    "wrong family": (other_family, "bert|fit its config|shape that config.json says|is missing"),
    "no tokenizer": (without_tokenizer, "has no tokenizer"),
}


NOT_WRONG = {
    ("dlm.load_model", "no tokenizer"),  # a library may ask for the weights alone
    ("embedder", "wrong family"),  # a BERT is what an embedder is
    ("embedder", "a tokenizer of another model"),  # this one has rows to spare
    ("atoms (textkv.masa)", "an index without one of its files"),  # atoms have no index
}


@pytest.mark.parametrize("loader", LOADERS)
def test_a_model_is_whole_or_refused(loader, sources, tmp_path, reliability):
    source, load = LOADERS[loader]
    source = sources / source if isinstance(source, str) else source
    for number, (fault, (damage, line)) in enumerate(DAMAGE.items()):
        if (loader, fault) in NOT_WRONG:
            continue
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        damage(folder)
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            load(str(folder))
        told = str(caught.value)
        assert "\n" not in told and len(told) < 700, (fault, told)
        assert re.search(line, told, re.IGNORECASE), (fault, told)
        reliability(6, fault, loader, "one line")


@pytest.mark.parametrize("loader", LOADERS)
def test_a_whole_model_is_loaded(loader, sources):
    source, load = LOADERS[loader]
    loaded = load(str(sources / source) if isinstance(source, str) else str(source))
    parts = loaded if isinstance(loaded, tuple) else (loaded, *vars(loaded).values())
    weights = [weight for part in parts if isinstance(part, torch.nn.Module) for weight in part.parameters()]
    assert weights and all(bool(weight.isfinite().all()) for weight in weights)


def test_vectors_of_an_index_are_whole_too(tmp_path, reliability):
    class Counted:
        def embed(self, texts):
            return torch.ones(len(texts), DIM)

    chunks = [Chunk("a.txt", 0, "one"), Chunk("a.txt", 4, "two")]
    for fault, change in {
        "NaN weights": lambda file: save_file({"vectors": torch.full((2, DIM), float("nan"))}, file),
        "missing weight": lambda file: save_file({"others": torch.ones(2, DIM)}, file),
        "weight of another shape": lambda file: save_file({"vectors": torch.ones(3, DIM)}, file),
        "truncated safetensors": lambda file: file.write_bytes(file.read_bytes()[:40]),
    }.items():
        Index(chunks, "minilm", torch.ones(2, DIM), Counted()).save(tmp_path)
        change(tmp_path / VECTORS)
        with pytest.raises(ValueError, match="is damaged .*; build it again"):
            Index.load(tmp_path)
        reliability(6, fault, "textkv.rag index", "one line")


def test_a_count_of_what_is_not_finite():
    tensors = {"a": torch.tensor([1.0, float("nan"), float("inf")]), "b": torch.ones(2), "c": torch.tensor([1, 2])}
    with pytest.raises(ValueError, match=r"^2 weights at here are not finite: a \(2\); take other weights$"):
        check_tensors("here", tensors.items())
    check_tensors("here", {"whole": torch.ones(2), "none": torch.empty(0)}.items())
