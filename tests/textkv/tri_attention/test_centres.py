"""Files of query centres: what is saved is read again, what is damaged or of another model is told in one line."""

import pytest
import torch
from safetensors.torch import save_file

from tests.textkv import tiny
from textkv import MethodCache
from textkv.evidence import QueryCentres
from textkv.segments.base import Stored
from textkv.tri_attention.centres import FILE, Centres

HEADER = '{"format": 1, "model": "toy", "tokens": 9, "settings": {}}'


def made(heads=4, head_dim=16, layers=3):
    g = torch.Generator().manual_seed(0)
    return Centres(
        {
            n: QueryCentres(
                torch.tensor([9.0]), torch.randn(1, heads, head_dim, generator=g),
                torch.rand(1, heads, head_dim // 2, generator=g) + 1,
            )
            for n in range(layers)
        },
        "toy",
        {"tokens": 9},
    )  # fmt: skip


def test_centres_survive_their_file(tmp_path):
    centres = made()
    centres.save(tmp_path / FILE)
    for path in (tmp_path, tmp_path / FILE, str(tmp_path)):
        read = Centres.load(path)
        assert (read.model, read.settings, list(read.layers)) == ("toy", {"tokens": 9}, [0, 1, 2])
        for number, of_layer in centres.layers.items():
            for ours, expected in zip(vars(read.layers[number]).values(), vars(of_layer).values(), strict=True):
                assert torch.equal(ours, expected)


def test_the_embedded_model_s_queries_are_concentrated():
    """Of layers 1 and 2, whose heads look at sinks and copy, nearly all of each query is its head's centre."""
    centres = Centres.load("mini")
    assert [of_layer.mean.shape[1:] for of_layer in centres.layers.values()] == [(4, 32)] * 4
    for of_layer in centres.layers.values():
        pairs = of_layer.mean[0].unflatten(-1, (2, 16)).norm(dim=-2)
        assert bool((pairs <= of_layer.lengths[0] + 1e-4).all())
    shares = centres.settings["concentration"]
    assert min(shares["1"] + shares["2"]) > 0.9 and 0.5 < min(shares["0"]) < 0.8


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        (None, "", "cannot be read"),
        ({"0.mean": [[1.0]], "0.lengths": [[1.0]]}, None, "cannot be read: 'header'"),
        ({"0.mean": [[1.0]], "0.lengths": [[1.0]]}, '{"format": 7}', "format 7, this version reads 1"),
        ({"0.mean": [[1.0]]}, HEADER, "0.lengths"),
        ({"0.mean": [[1.0]], "0.lengths": [[-1.0]]}, HEADER, "layer 0: means must be finite, and lengths finite and"),
        ({"0.mean": [[float("nan")]], "0.lengths": [[1.0]]}, HEADER, "layer 0: means must be finite"),
        ({"0.mean": [[1.0], [2.0]], "0.lengths": [[1.0]]}, HEADER, "need .* of the same heads"),
        ({"0.mean": [1.0], "0.lengths": [[1.0]]}, HEADER, "need .*heads, head_dim"),
        ({"other": [1.0]}, HEADER, "cannot be read: invalid literal"),
        ({}, HEADER, "no layers"),
    ],
)
def test_a_damaged_file_is_told(tmp_path, tensors, header, message):
    path = tmp_path / "c.safetensors"
    if tensors is None:
        path.write_bytes(b"no tensors")
    else:
        held = {name: torch.tensor(x) for name, x in tensors.items()}
        save_file(held, path, metadata=None if header is None else {"header": header})
    with pytest.raises(ValueError, match=message) as told:
        Centres.load(path)
    assert "\n" not in str(told.value) and "c.safetensors" in str(told.value)


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(ValueError, match="there is no tri_attention.safetensors; make one with `python -m textkv.tri_"):
        Centres.load(tmp_path)


@pytest.mark.parametrize("wrapper", ["", "+adakv"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(heads=2), r"holds \(heads, head_dim, pairs\) = \(2, 16, 8\) for layer 0, the model has \(4, 16, 8\)"),
        (
            dict(head_dim=8),
            r"= \(4, 8, 4\) for layer 0, the model has \('\?', 16, 8\); make them for .* `python -m text",
        ),
        (dict(layers=2), "holds nothing for layer 2"),
    ],
)
def test_centres_of_another_model_are_refused(model_of, tmp_path, wrong, message, wrapper):
    made(**wrong).save(tmp_path / FILE)
    model = model_of("llama")
    cache = MethodCache(model, f"tri_attention(centres={str(tmp_path)!r}){wrapper}", 0.5)
    if wrapper:  # told at the end of the prompt, when the number of heads is known
        message = message.replace(r"\('\?',", r"\(4,")
    with pytest.raises(ValueError, match=message), torch.no_grad():
        model(tiny.text_ids(20), past_key_values=cache)


def test_a_head_that_comes_alone_is_scored_by_its_own_centres(model_of, tmp_path):
    """Heads that a wrapper gave numbers of tokens of their own are scored one by one: as in the whole layer."""
    made().save(tmp_path / FILE)
    model, ids = model_of("llama"), tiny.text_ids(40)
    cache = MethodCache(model, f"tri_attention(centres={str(tmp_path)!r})", 0.5)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    layer, scorer = cache.layers[1], cache.method
    held, evidence = layer.stored(), scorer.recall(layer)
    whole = scorer.score(layer, held, evidence, 10)
    for head in range(2):
        part = Stored(*(x[:, head : head + 1] for x in (held.keys, held.values, held.positions)))
        alone = scorer.score(layer, part, evidence.part(0, head, 2, torch.arange(20)), 10)
        torch.testing.assert_close(alone[:, 0], whole[:, head])
    ragged = MethodCache(model, f"{cache.method.expression}+adakv(floor=0.0)", 0.5)
    with torch.no_grad():
        model(ids, past_key_values=ragged)
        lengths = {tuple(x.lengths()[0].tolist()) for x in ragged.layers}
        model(tiny.text_ids(20, seed=1), past_key_values=ragged)
    assert any(a != b for a, b in lengths) and {int(x.lengths().sum()) for x in ragged.layers} == {60}
