"""What a name stands for, who is refused, and sentence vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from textkv.models import __main__ as command
from textkv.models import load, place, resolve
from textkv.models.embedder import Embedder


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_name_a_folder_and_a_hub_id(tmp_path, monkeypatch) -> None:
    assert Path(resolve("mini"), "model.safetensors").exists()
    assert resolve(str(tmp_path)) == str(tmp_path)
    assert resolve("some-owner/Some-Model_1.5") == "some-owner/Some-Model_1.5"
    monkeypatch.chdir(tmp_path)
    Path("smollm2").mkdir()
    assert resolve("./smollm2") == "./smollm2", "a folder of a known name is reached by its path"
    with pytest.raises(FileNotFoundError, match="run `python -m textkv.models install smollm2`"):
        resolve("smollm2")


@pytest.mark.parametrize(
    ("name", "use", "error", "message"),
    [
        ("gemma3-270m", "text", FileNotFoundError, "install gemma3-270m"),
        ("minilm", "embedder", FileNotFoundError, "install minilm"),
        ("minilm", "text", ValueError, "here a model for text is needed"),
        ("smollm2", "embedder", ValueError, "here a model for embedder is needed"),
        ("smolm2", "text", FileNotFoundError, "did you mean smollm2"),
        ("nowhere", "text", FileNotFoundError, "give a folder, a hub id owner/model, or mini, smollm2, gemma3-270m"),
        ("/no/such/folder", "text", FileNotFoundError, "no such folder"),
    ],
)
def test_others_are_refused_in_one_line(name, use, error, message) -> None:
    with pytest.raises(error, match=message) as raised:
        resolve(name, use)
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_model_is_one_line(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="cannot be loaded") as raised:
        load(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_the_list_says_where_or_how(capsys) -> None:
    assert command.main(["list"]) == 0
    said = capsys.readouterr().out
    assert "python -m textkv.models install smollm2" in said and "Gemma Terms of Use" in said
    made = place.folder_of("smollm2")
    made.mkdir(parents=True)
    (made / place.RECORD).write_text("{}")
    command.main(["list"])
    said = capsys.readouterr().out
    assert "install smollm2" not in said and "install minilm" in said


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a BERT of one layer."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    return str(folder)


def test_vectors_have_length_1_and_do_not_depend_on_their_batch(bert) -> None:
    embedder = Embedder.load(bert)
    texts = ["a b c", "d", "e f g h i j a b c", "", "b " * 400]
    got = embedder.embed(texts)
    assert got.shape == (5, 16) == (5, embedder.dim) and got.dtype == torch.float32
    torch.testing.assert_close(got.norm(dim=-1), torch.ones(5))
    alone = torch.cat([embedder.embed([text]) for text in texts])
    torch.testing.assert_close(got, alone, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(embedder.embed(texts, batch=2), got, atol=1e-6, rtol=1e-5)
    assert embedder.embed([]).shape == (0, 16)


def test_a_vector_is_the_mean_of_the_last_states(bert) -> None:
    embedder = Embedder.load(bert)
    states = embedder._model(**embedder._tokenizer(["a b c"], return_tensors="pt")).last_hidden_state[0]
    mean = states.mean(0)
    torch.testing.assert_close(embedder.embed(["a b c"])[0], mean / mean.norm())


def test_what_embed_does_not_take(bert, tmp_path) -> None:
    with pytest.raises(ValueError, match="give a list"):
        Embedder.load(bert).embed("a text")
    with pytest.raises(ValueError, match="batch=0"):
        Embedder.load(bert).embed(["a"], batch=0)
    with pytest.raises(FileNotFoundError, match="cannot be loaded"):
        Embedder.load(str(tmp_path))
