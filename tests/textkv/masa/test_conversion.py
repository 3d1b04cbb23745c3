"""A pretrained model in terms of atoms: exact where it must be, smaller on disk, read by every command."""

import copy
import json

import pytest
import torch

from tests.textkv.masa.test_atoms import logits, tiny
from tests.textkv.test_conformance import OURS, SPELLED
from textkv import MethodCache, models, use
from textkv.masa import Conversion, Sharing, convert, export, groups_of, load, plan, save, share
from textkv.masa.command import main
from textkv.mini import load_mini
from textkv.models.atoms import FILE


def rows(texts=3, length=16):
    return torch.randint(0, 60, (texts, length), generator=torch.Generator().manual_seed(3))


def test_as_many_atoms_as_layers_change_nothing():
    model = tiny()
    before = logits(model)
    convert(model, Conversion(atoms=4, reduction=None), rows())
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("atoms", [0, 1])
def test_the_budget_holds_and_rests_help(atoms):
    errors = []
    for reduction in (0.45, 0.3, 0.1):
        model, plain = tiny(), tiny().state_dict()
        made = convert(model, Conversion(atoms=atoms, groups=2, reduction=reduction), rows())
        assert reduction <= made.reduction + 1e-9 and made.reduction < reduction + 0.02
        weights = {name: weight for group in made.groups for name, weight in group.weights().items()}
        errors.append(sum(float((plain[name] - weight).norm() ** 2) for name, weight in weights.items()))
    assert errors[0] > errors[1] > errors[2]


def test_a_plan_serves_every_reduction_and_leaves_the_model_alone():
    model = tiny()
    before, planned = logits(model), plan(model, Conversion(atoms=1, groups=2), rows())
    for reduction in (0.4, 0.1):
        made = convert(tiny(), Conversion(atoms=1, groups=2, reduction=reduction), rows())
        found = planned.at(reduction)
        assert (found.parameters, found.cuts) == (made.parameters, made.cuts)
        for ours, theirs in zip(found.groups, made.groups, strict=True):
            for name, weight in ours.weights().items():
                assert torch.equal(weight, theirs.weights()[name])
    assert torch.equal(logits(model), before)


def test_what_is_written_is_smaller_and_comes_back(tmp_path):
    model = tiny(tie_word_embeddings=True)
    convert(model, Conversion(atoms=1, groups=2, reduction=0.4), rows())
    before = logits(model)
    file = save(model, tmp_path / "atoms")
    export(model).save_pretrained(tmp_path / "plain")
    assert file.stat().st_size < (tmp_path / "plain" / "model.safetensors").stat().st_size
    for combined in (True, False):
        torch.testing.assert_close(logits(load(tmp_path / "atoms", combined=combined)), before, atol=1e-5, rtol=1e-5)


def test_damaged_or_foreign_files_are_one_line(tmp_path):
    model = tiny()
    convert(model, Conversion(atoms=1, reduction=None), rows())
    file = save(model, tmp_path / "atoms")
    whole = file.read_bytes()
    for broken in (b"", whole[:100], whole[:-7], b"x" * 64):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="^[^\n]+$"):
            load(tmp_path / "atoms")
    file.write_bytes(whole)
    config = json.loads((tmp_path / "atoms" / "config.json").read_text())
    (tmp_path / "atoms" / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(ValueError, match="config.json"):
        load(tmp_path / "atoms")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="name another folder"):
        save(model, tmp_path / "mine")
    with pytest.raises(ValueError, match="has no atoms"):
        save(tiny(), tmp_path / "none")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(atoms=0, reduction=None), "at least 1"),
        (dict(atoms=1, groups=0), "groups=0"),
        (dict(atoms=1, reduction=1.0), "reduction=1.0"),
        (dict(atoms=1, reduction=-0.1), "reduction=-0.1"),
    ],
)
def test_a_conversion_that_cannot_be_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Conversion(**wrong)


@pytest.mark.parametrize(
    ("conversion", "says"),
    [
        (dict(atoms=3, groups=2), "atoms=3 is more than the 2 layers of a group"),
        (dict(atoms=1, groups=3), "group of one layer"),
        (dict(atoms=1, groups=9), "groups=9 of 4 layers would leave a group of one layer; use 1 to 2"),
        (dict(atoms=2, reduction=0.9), "fewer atoms or a smaller cut"),
    ],
)
def test_a_model_is_left_as_it_was_when_a_conversion_does_not_fit(conversion, says):
    model = tiny()
    before = logits(model)
    with pytest.raises(ValueError, match=says):
        convert(model, Conversion(**conversion), rows())
    assert torch.equal(logits(model), before)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masa") / "mini"
    line = f"convert --model mini --atoms 1 --reduction 0.1 --texts 4 --length 64 --out {folder}"
    assert main(line.split()) == 0
    return folder


def test_the_command_writes_what_every_command_reads(converted, tmp_path, capsys):
    assert (converted / FILE).is_file()
    model, tokenizer = models.load(str(converted))
    ids = tokenizer("the lamp is red", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
    assert main(f"export --model {converted} --out {tmp_path / 'plain'}".split()) == 0
    plain, _ = models.load(str(tmp_path / "plain"))
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def both():
    """A model with atoms, still combined in every forward, and the plain one that it exports to."""
    model = share(tiny(), Sharing(atoms=2))
    plain = export(copy.deepcopy(model))
    assert groups_of(model) and not groups_of(plain)  # what becomes of a copy is no matter of the original's
    return model, plain


@pytest.mark.parametrize("method", OURS)
def test_every_cache_works_on_it_unchanged(both, method):
    ids = torch.randint(0, 60, (1, 64), generator=torch.Generator().manual_seed(1))
    seen = []
    for model in both:
        use(model)
        cache = MethodCache(model, SPELLED.get(method, method), 0.5)
        with torch.no_grad():
            first = model(ids[:, :-4], past_key_values=cache).logits[:, -1:]
            rest = [model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(60, 64)]
        assert cache.tokens_seen == 64
        seen.append((torch.cat([first, *rest], 1), cache.kv_bytes()))
    torch.testing.assert_close(seen[0][0], seen[1][0], atol=1e-4, rtol=1e-4)
    assert seen[0][1] == seen[1][1]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("convert --model nowhere --atoms 1 --out {out}", "nowhere"),
        ("convert --model mini --atoms -1 --out {out}", "-1"),
        ("convert --model mini --atoms 99 --out {out}", "atoms=99"),
        ("convert --model mini --atoms 1 --groups 0 --out {out}", "count"),
        ("convert --model mini --atoms 1 --reduction 20 --out {out}", "0.2"),
        ("convert --model mini --atoms 1 --projections xyz --out {out}", "qkvo"),
        ("convert --model mini --atoms 1 --text {out}/none --out {out}", "no file"),
        ("export --model mini --out {out}", "plain weights already"),
        ("train --layers 2 --atoms 3", "atoms=3 is more than the 2 layers"),
        ("", "command"),
    ],
)
def test_a_wrong_request_is_one_line(line, says, tmp_path, capsys):
    assert main(line.format(out=tmp_path / "out").split()) == 2
    told = capsys.readouterr().err
    assert says in told and told.strip().count("\n") == 0


def test_the_embedded_model_can_be_converted_in_place():
    model, _ = load_mini()
    made = convert(model, Conversion(atoms=1, reduction=0.1), torch.randint(5, 200, (2, 64)))
    assert 0.1 <= made.reduction < 0.15
