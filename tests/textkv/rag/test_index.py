"""Documents, the index on disk, and answers from it with the mini model."""

import json

import pytest
import torch

from textkv.models.loading import load
from textkv.rag import Chunk, Index, Reader, read_folder
from textkv.rag.commands import main
from textkv.rag.documents import cut

TEXTS = {"a.txt": "The lighthouse of Varn was built by Ilse Korr.", "b.md": "Bread is baked in Tolm.", "c.py": "no"}


class Letters:
    """An embedder of the user's own: how often each letter occurs."""

    def embed(self, texts):
        return torch.tensor([[float(text.lower().count(chr(97 + n))) for n in range(26)] for text in texts])


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "documents"
    place.mkdir()
    for name, text in TEXTS.items():
        (place / name).write_text(text)
    return place


def test_chunks_overlap_and_keep_their_place():
    text = " ".join(f"w{n}" for n in range(10))
    chunks = cut("x", text, words=4, overlap=1)
    assert [chunk.text for chunk in chunks] == ["w0 w1 w2 w3", "w3 w4 w5 w6", "w6 w7 w8 w9"]
    assert all(text[chunk.start :].startswith(chunk.text) for chunk in chunks)
    with pytest.raises(ValueError, match="overlap=4"):
        cut("x", text, 4, 4)


@pytest.mark.parametrize("embedder", ["bm25", "tests.textkv.rag.test_index:Letters"])
def test_an_index_comes_back_from_disk(folder, tmp_path, embedder):
    index = Index.build(read_folder(folder), embedder)
    index.save(tmp_path / "index")
    again = Index.load(tmp_path / "index", embedder)
    question = "Who built the lighthouse of Varn?"
    assert again.search(question, 2) == index.search(question, 2)
    assert again.search(question, 1)[0].chunk.source == "a.txt"
    with pytest.raises(ValueError, match="was built with embedder"):
        Index.load(tmp_path / "index", "minilm")


def test_rare_words_count_more_and_long_chunks_less():
    index = Index([Chunk("a", 0, "the cat the dog"), Chunk("b", 0, "the owl"), Chunk("c", 0, "the the the cat x y z")])
    assert [p.chunk.source for p in index.search("the owl", 3)][0] == "b"
    assert [p.chunk.source for p in index.search("cat", 3)] == ["a", "c"]
    assert index.search("cat cat", 1) == index.search("cat", 1)


@pytest.mark.parametrize("embedder", ["bm25", "tests.textkv.rag.test_index:Letters"])
def test_a_damaged_index_is_one_line(folder, tmp_path, embedder):
    place = tmp_path / "index"
    Index.build(read_folder(folder), embedder).save(place)
    record = json.loads((place / "index.json").read_text())
    for changed in ({"chunks": None}, {"chunks": [1]}, {"chunks": [{"x": 1}]}, {"chunks": []}, {"embedder": [1]}):
        (place / "index.json").write_text(json.dumps(record | changed))
        with pytest.raises(ValueError, match="^[^\n]*damaged[^\n]*$"):
            Index.load(place)
    (place / "index.json").write_text(json.dumps(record))
    if embedder != "bm25":
        (place / "vectors.safetensors").write_bytes(b"x" * 20)
        with pytest.raises(ValueError, match="damaged"):
            Index.load(place)


def test_no_shared_word_is_no_passage():
    assert Index([Chunk("a", 0, "one two")]).search("three") == []


@pytest.mark.parametrize("cache, budget", [("full", None), ("critic", 0.5)])
def test_the_mini_model_answers(folder, cache, budget):
    reader = Reader(*load("mini"), cache=cache, budget=budget)
    answer = reader.ask("Who built the lighthouse?", Index.build(read_folder(folder)), k=1, most=4)
    with pytest.raises(ValueError, match="nothing in the index shares a word"):
        reader.ask("Xyzzy", Index.build(read_folder(folder)))
    assert answer.passages[0].chunk.source == "a.txt" and answer.prefill_tokens > 10 and answer.tokens <= 4


def test_refusals_are_one_line(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    index = str(tmp_path / "index")
    assert main(["index", str(folder), "--out", index]) == 0
    capsys.readouterr()
    for given, said in (
        (["index", str(tmp_path / "empty"), "--out", index], "no text in"),
        (["index", str(folder), "--out", str(other)], "holds something else than of python -m textkv.rag index"),
        (["index", str(folder), "--out", index, "--embedder", "nowhere:X"], "No module named"),
        (["ask", " ?", "--index", index], "has no word"),
        (["ask", "Who?", "--index", str(other)], "no index in"),
        (["ask", "Who?", "--index", index, "--embedder", "minilm"], "was built with embedder bm25"),
    ):
        assert main(given) == 2
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1


def test_training_is_a_command_of_its_own_where_there_is_a_checkout(capsys, monkeypatch):
    pytest.importorskip("trl", reason="needs the extra porag: pip install 'agentkv[porag]'")
    assert main(["train", "--group", "1"]) == 2
    assert "group=1" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train"]) == 2
    line = capsys.readouterr().err
    assert "python -m training.rag.train" in line and line.count("\n") == 1
