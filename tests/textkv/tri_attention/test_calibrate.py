"""Calibration: centres are those of the model's own queries before the rotation, and the command writes them."""

import time

import pytest
import torch

from agentkv.eval import tiny as families
from tests.textkv import tiny
from tests.textkv.methods.test_expected import plain_queries
from textkv import MethodCache
from textkv.attention import runs_on_ours
from textkv.kinds import text_config
from textkv.mini import load_mini
from textkv.tri_attention.calibrate import calibrate, main, read_text
from textkv.tri_attention.centres import FILE, Centres


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_centres_are_those_of_the_queries_before_the_rotation(model_of, family):
    """After a norm of queries (Qwen3), with a bias (Qwen2); every piece begins with the start token at position 0."""
    model, ids = model_of(family), tiny.text_ids(60)[0]
    taken = [torch.cat([torch.tensor([1]), piece])[None] for piece in ids.split(24)]
    with torch.no_grad():
        pieces = [plain_queries(model, lambda piece=piece: model(piece)) for piece in taken]
    found = calibrate(model, ids, length=25, start=1, name="toy")
    assert (found.model, found.settings["length"], list(found.layers)) == ("toy", 25, [0, 1, 2])
    for number, of_layer in found.layers.items():
        q = torch.cat([piece[number][0] for piece in pieces], 1)
        half = q.shape[-1] // 2
        assert of_layer.count.tolist() == [63.0]
        torch.testing.assert_close(of_layer.mean[0].double(), q.mean(1), atol=2e-4, rtol=1e-4)
        lengths = torch.hypot(q[..., :half], q[..., half:]).mean(1)
        torch.testing.assert_close(of_layer.lengths[0].double(), lengths, atol=2e-4, rtol=1e-4)
        share = torch.hypot(q.mean(1)[..., :half], q.mean(1)[..., half:]).sum(-1) / lengths.sum(-1)
        assert found.settings["concentration"][str(number)] == pytest.approx(share.tolist(), abs=2e-3)


def test_the_model_is_left_as_it_was(model_of):
    model, ids = model_of("llama"), tiny.text_ids(30)
    with torch.no_grad():
        before = model(ids).logits
    calibrate(model, ids[0])
    assert not runs_on_ours(text_config(model))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    cache = MethodCache(model, "full")
    calibrate(model, ids[0])
    with torch.no_grad():
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_vision_model_is_calibrated_by_text_and_then_reads_images(model_of, family, tmp_path):
    model = model_of(family)
    calibrate(model, tiny.text_ids(50)[0]).save(tmp_path / FILE)
    inputs, spans = tiny.screens(2)
    cache = MethodCache(model, f"tri_attention(centres={str(tmp_path)!r})", 0.5)
    cache.begin(**inputs, spans=spans)
    with torch.no_grad():
        out = model(**inputs, past_key_values=cache).logits
    assert bool(out.isfinite().all())
    assert cache.at_rest.tokens_stored == inputs["input_ids"].shape[1] // 2


def test_windows_and_layers_that_do_not_turn_are_told_apart():
    windows = families.build("gemma3_text")
    found = calibrate(windows, tiny.text_ids(40)[0] % 90)
    governed = [kind.number for kind in MethodCache(windows, "full").context.kinds if kind.governed]
    assert list(found.layers) == governed
    still = calibrate(families.build("smollm3"), tiny.text_ids(40)[0] % 90)
    turning = {number: of_layer.lengths.shape[-1] for number, of_layer in still.layers.items()}
    assert set(turning.values()) == {0, 8}
    told = still.settings["concentration"]
    assert all((told[str(number)] == []) == (pairs == 0) for number, pairs in turning.items())


def test_the_embedded_centres_hardly_depend_on_the_text():
    """Another text, a sixteenth as long: centres move by a small part of their length."""
    model, tokenizer = load_mini()
    text = "KING. Now is the winter of our discontent, and all that we have lost is lost again. " * 60
    start = time.process_time()
    found = calibrate(model, read_text(tokenizer, text, 2048), start=tokenizer.bos_token_id)
    assert time.process_time() - start < 20
    for number, given in Centres.load("mini").layers.items():
        alike = torch.cosine_similarity(found.layers[number].mean[0], given.mean[0], dim=-1)
        assert bool((alike > 0.5).all()) and float(alike.mean()) > 0.7


def test_the_command_writes_a_file_that_the_method_reads(tmp_path, capsys):
    main(["calibrate", "--model", "mini", "--out", str(tmp_path / FILE), "--tokens", "300", "--length", "128"])
    said = capsys.readouterr().out
    assert f"{FILE}: centres of 4 layers from 300 tokens; concentration of 16 query heads 0." in said
    centres = Centres.load(tmp_path)
    assert centres.model == "mini" and int(centres.layers[0].count) == 303
    assert (centres.settings["tokens"], centres.settings["length"]) == (300, 128)
    model, _ = load_mini()
    cache = MethodCache(model, f"tri_attention(centres={str(tmp_path)!r})", "16t")
    with torch.no_grad():
        model(tiny.text_ids(40), past_key_values=cache)
    assert cache.at_rest.tokens_stored == 16
    assert cache.method.expression == f"tri_attention(centres={str(tmp_path)!r})"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--length", "1"], "pieces of length=1: give a text, and at least 2 tokens a piece"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--tokens", "0"], "0 is not a number of tokens"),
    ],
)
def test_what_cannot_be_calibrated_is_told(capsys, more, message):
    assert main(["calibrate", "--model", "mini", *more]) == 2
    assert message in capsys.readouterr().err
