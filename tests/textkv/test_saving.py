"""A save is whole or it is refused: with one kind of error, and without harm to what was there."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from agentkv.eval import tiny as families
from tests.textkv import kinds
from textkv import MethodCache, store

FILE = "cache.safetensors"


def filled(kind: str, method: str = "snapkv", budget=0.4, seed: int = 0):
    model = kinds.model_of_kind(kind)
    cache = MethodCache(model, method, budget)
    kinds.logits(model, kinds.ids(60, 2, seed=seed), cache)
    kinds.steps(model, kinds.ids(3, 2, seed=seed + 1), cache)
    return model, cache


def refusal(folder, model) -> list[str]:
    """The lines of the ValueError that loading raises; it must be one."""
    with pytest.raises(ValueError) as error:
        MethodCache.load(folder, model)
    assert error.type is ValueError, repr(error.value)
    return str(error.value).split("\n")


@pytest.mark.parametrize("kind", list(kinds.KINDS))
@pytest.mark.parametrize(("method", "budget"), kinds.METHODS)
def test_round_trip(tmp_path, kind, method, budget):
    model, cache = filled(kind, method, budget)
    cache.save(tmp_path)
    loaded = MethodCache.load(tmp_path, model)
    assert loaded.kv_bytes() == cache.kv_bytes() and loaded.get_seq_length() == 63
    assert str(loaded.method.budget) == str(cache.method.budget)
    turn = kinds.ids(8, 2, seed=5)
    for name, held in (("first", cache), ("again", loaded)):  # saved again, it is the same
        held.save(tmp_path / name)
    assert parts_of(tmp_path / "first")[0] == parts_of(tmp_path / "again")[0]
    expected = [kinds.logits(model, turn, cache), kinds.steps(model, turn[:, :3], cache)]
    ours = [kinds.logits(model, turn, loaded), kinds.steps(model, turn[:, :3], loaded)]
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("kind", list(kinds.KINDS))
def test_an_empty_cache(tmp_path, kind):
    model = kinds.model_of_kind(kind)
    MethodCache(model, "adakv", 0.5).save(tmp_path)
    loaded = MethodCache.load(tmp_path, model)
    fresh = MethodCache(model, "adakv", 0.5)
    assert torch.equal(kinds.logits(model, kinds.ids(20), loaded), kinds.logits(model, kinds.ids(20), fresh))


@pytest.mark.parametrize("method", ["adakv", "kivi(4)"])
def test_a_truncated_save(tmp_path, method):
    model, cache = filled("dense", method, None if method == "kivi(4)" else 0.4)
    cache.save(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    for i in range(50):
        (tmp_path / FILE).write_bytes(whole[: len(whole) * i // 50])
        assert len(refusal(tmp_path, model)) == 1
    (tmp_path / FILE).write_bytes(whole[:-1])
    assert len(refusal(tmp_path, model)) == 1
    (tmp_path / FILE).write_bytes(whole + b"\0")
    assert len(refusal(tmp_path, model)) == 1


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_edited_bytes(tmp_path, kind):
    model, cache = filled(kind)
    cache.save(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    generator = torch.Generator().manual_seed(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    # Half of them where the words are, half among the numbers.
    places = torch.cat([torch.randint(0, header, (25,), generator=generator),
                        torch.randint(header, len(whole), (25,), generator=generator)])  # fmt: skip
    for place in places.tolist():
        for value in (whole[place] ^ 1, whole[place] ^ 0x80):
            (tmp_path / FILE).write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            assert len(refusal(tmp_path, model)) == 1
    (tmp_path / FILE).write_bytes(whole)
    MethodCache.load(tmp_path, model)


def parts_of(folder):
    with safe_open(folder / FILE, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}


def test_two_saves_mixed(tmp_path):
    model, cache = filled("dense")
    _, other = filled("dense", seed=7)
    cache.save(tmp_path / "a")
    other.save(tmp_path / "b")
    said, _ = parts_of(tmp_path / "a")
    _, tensors = parts_of(tmp_path / "b")
    (tmp_path / "mixed").mkdir()
    save_file(tensors, tmp_path / "mixed" / FILE, metadata=said)
    assert len(refusal(tmp_path / "mixed", model)) == 1


def resealed(folder, change) -> None:
    """A save whose header was changed, with a checksum that fits: what a careless tool would leave."""
    said, tensors = parts_of(folder)
    header = json.loads(said["header"])
    change(header, tensors)
    text = json.dumps(header, sort_keys=True)
    save_file(tensors, folder / FILE, metadata={"header": text, "checksum": store._checksum(text, tensors)})


CHANGES = {
    "no layers": lambda h, t: h.pop("layers"),
    "too few layers": lambda h, t: h["layers"].pop(),
    "no model": lambda h, t: h.pop("model"),
    "unknown method": lambda h, t: h.update(method="snapkw"),
    "method of another type": lambda h, t: h.update(method=3),
    "budget of another type": lambda h, t: h.update(budget=[1]),
    "unknown segment": lambda h, t: h["layers"][1]["segments"][0].update(name="attic"),
    "no segments": lambda h, t: h["layers"][1].pop("segments"),
    "no tensor": lambda h, t: t.pop("1.0.k"),
    "another format": lambda h, t: h.update(format=1),
    "spans of another type": lambda h, t: h.update(spans=3),
    "a span of another type": lambda h, t: h.update(spans=[["ab"], []]),
    "tokens of another type": lambda h, t: h["layers"][1].update(seen="63"),
    "fewer tokens than none": lambda h, t: h["layers"][1].update(real_seen=[-1, 63]),
    "heads of another type": lambda h, t: h["layers"][1].update(kv_heads={}),
    "dtype that is a function": lambda h, t: h["layers"][1].update(dtype="torch.add"),
    "dtype that is none": lambda h, t: h["layers"][1].update(dtype="os.system"),
    "rows that do not fit": lambda h, t: h["layers"][1].update(real_seen=[63]),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_header_that_makes_no_sense(tmp_path, change):
    model, cache = filled("dense")
    cache.save(tmp_path)
    resealed(tmp_path, lambda h, t: None)
    MethodCache.load(tmp_path, model)
    resealed(tmp_path, CHANGES[change])
    assert len(refusal(tmp_path, model)) == 1


def test_another_model(tmp_path):
    _, cache = filled("dense")
    cache.save(tmp_path)
    for kind in ("sliding", "hybrid", "sinks"):
        assert len(refusal(tmp_path, kinds.model_of_kind(kind))) == 1


@pytest.mark.parametrize("how", ["half", "bfloat16"])
def test_another_dtype(tmp_path, how):
    model, cache = filled("dense")
    cache.save(tmp_path)
    assert len(refusal(tmp_path, getattr(deepcopy(model), how)())) == 1


def test_a_model_whose_layers_have_heads_of_their_own(tmp_path):
    """Gemma 4's configuration has no head_dim for all layers and says so by an error of its own."""
    model = families.build("gemma4_text")
    cache = MethodCache(model, "snapkv", 0.5)
    kinds.logits(model, kinds.ids(24), cache)
    cache.save(tmp_path)
    loaded = MethodCache.load(tmp_path, model)
    ours, theirs = (kinds.steps(model, kinds.ids(3), x) for x in (cache, loaded))
    assert torch.equal(ours, theirs)


def test_nothing_there(tmp_path):
    model = kinds.model_of_kind("dense")
    assert len(refusal(tmp_path, model)) == 1
    assert len(refusal(tmp_path / "nowhere", model)) == 1
    (tmp_path / FILE).mkdir()
    assert len(refusal(tmp_path, model)) == 1


def test_a_failing_write_leaves_nothing_and_harms_nothing(tmp_path, monkeypatch):
    model, cache = filled("dense")
    cache.save(tmp_path)
    before = (tmp_path / FILE).read_bytes()
    kinds.steps(model, kinds.ids(2, 2), cache)

    def half_way(tensors, path, metadata=None):
        save_file(tensors, path, metadata=metadata)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(store, "save_file", half_way)
    with pytest.raises(OSError, match="no space left"):
        cache.save(tmp_path)
    assert [x.name for x in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).read_bytes() == before
    assert MethodCache.load(tmp_path, model).get_seq_length() == 63
    with pytest.raises(OSError, match="no space left"):
        cache.save(tmp_path / "new")
    assert not any((tmp_path / "new").glob("*"))
    monkeypatch.undo()
    cache.save(tmp_path)
    assert MethodCache.load(tmp_path, model).get_seq_length() == 65


def test_a_failing_rename_leaves_nothing_beside(tmp_path, monkeypatch):
    _, cache = filled("dense")
    cache.save(tmp_path)

    def refuse(source, target):
        raise PermissionError("read-only")

    monkeypatch.setattr(store.os, "replace", refuse)
    with pytest.raises(PermissionError):
        cache.save(tmp_path)
    assert [x.name for x in tmp_path.iterdir()] == [FILE]
    monkeypatch.undo()
    shutil.rmtree(tmp_path)
    cache.save(tmp_path)  # a folder that is gone is made again
    assert (tmp_path / FILE).is_file()


def test_a_loaded_cache_does_not_hang_on_its_file(tmp_path):
    """Somebody copies another save over the file: what was loaded and checked goes on as it was."""
    model, cache = filled("dense")
    cache.save(tmp_path)
    loaded, file = MethodCache.load(tmp_path, model), tmp_path / FILE
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(kinds.logits(model, kinds.ids(5, 2), loaded), kinds.logits(model, kinds.ids(5, 2), cache))


@pytest.mark.parametrize("method", ["h2o", "snapkv", "expected", "full", "kivi(4)"])
def test_between_the_chunks_of_a_prompt(tmp_path, method):
    """What the chunks so far have shown of the prompt is not written: where a method asks for it, saving says so."""
    model, ids = kinds.model_of_kind("dense"), kinds.ids(60)
    cache = MethodCache(model, method, None if method in ("full", "kivi(4)") else 0.4)
    cache.begin(ids)
    kinds.logits(model, ids[:, :40], cache)
    if method in ("full", "kivi(4)"):
        cache.save(tmp_path)
        loaded = MethodCache.load(tmp_path, model)
        assert torch.equal(kinds.logits(model, ids[:, 40:], loaded), kinds.logits(model, ids[:, 40:], cache))
        return
    with pytest.raises(ValueError, match="40 of the 60 tokens of a prompt are read.*save when the prompt is through"):
        cache.save(tmp_path)
    assert not list(tmp_path.iterdir())
    kinds.logits(model, ids[:, 40:], cache)
    cache.save(tmp_path)
    loaded = MethodCache.load(tmp_path, model)
    assert torch.equal(kinds.steps(model, kinds.ids(3), loaded), kinds.steps(model, kinds.ids(3), cache))
