"""The command: what it prints, what it refuses before a model is loaded, the canvas it draws, files of prompts."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import GPT2Config

from dlm import generate, mini, sources
from dlm.canvas import Canvas
from dlm.decode import Stats, decode, decode_prompts
from dlm.mini import load_mini
from dlm.prompts import pad_left
from dlm.show import Painter, pieces
from dlm.sources import open_guide
from tests.dlm import untrained
from training.dlm.tokenizer import build_tokenizer

PROMPT = "tom has 37 apples. he buys 25. how many now?"
SHORT = ["--gen-length", "6", "--block-length", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained.make(tmp_path_factory.mktemp("weights"))


@pytest.fixture(autouse=True)
def embedded(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The untrained models stand for the embedded ones."""
    for module in (mini, sources):
        monkeypatch.setattr(module, "WEIGHTS", weights)


def expected(weights: Path, kind: str = "llada", prompt: str = PROMPT, **options) -> tuple[str, dict]:
    """What decode() itself gives."""
    model, tokenizer = load_mini(weights / kind)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    done = decode(model, ids, gen_length=6, block_length=3, **options)
    kept = done.ids[0].tolist()
    ends = [at for at, i in enumerate(kept) if i == tokenizer.eos_token_id]
    return tokenizer.decode(kept[: ends[0]] if ends else kept, skip_special_tokens=True), vars(done.stats)


def test_prints_the_text_and_its_cost(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, cost = expected(weights)
    assert generate.main(["--prompt", PROMPT, *SHORT]) == 0
    assert capsys.readouterr().out == text + "\n"
    assert generate.main(["--prompt", PROMPT, *SHORT, "--stats"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(text + "\n\ncache freecache, unmask confidence, guide none")
    for name in ("forwards", "query_tokens", "guider_forwards", "cache_bytes"):
        assert f"{name:<20}{cost[name]:,}\n" in said
    assert "tokens_per_forward  1.000\n" in said and "seconds" in said


def test_every_option_reaches_decode(weights: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = [
        "--prompt",
        PROMPT,
        *SHORT,
        "--model",
        str(weights / "dream"),
        "--cache",
        "dual",
        "--unmask",
        "threshold(0)",
    ]
    argv += ["--steps", "4", "--temperature", "0.7", "--top-p", "0.9", "--top-k", "9", "--seed", "5", "--cfg", "0.5"]
    argv += ["--eos", "none", "--dtype", "float32"]
    text, cost = expected(
        weights, "dream", cache="dual", unmask="threshold(0)", steps=4, temperature=0.7, top_p=0.9, top_k=9,
        cfg_scale=0.5, eos="none", generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    assert generate.main([*argv, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert generate.main([*argv, "--json", str(tmp_path / "new" / "x.json")]) == 0
    assert capsys.readouterr().out == text + "\n"
    written = json.loads((tmp_path / "new" / "x.json").read_text())
    for made in (printed, written):
        (row,) = made["rows"]
        assert row["text"] == text and row["query_tokens"] == cost["query_tokens"] and row["forwards"] == 2
        assert (row["cache"], row["unmask"], row["guide"]) == ("dual", "threshold(0)", "none")
        assert made["meta"]["command"].startswith("python -m dlm.generate --prompt") and made["meta"]["seed"] == 5


def test_prompt_from_a_file_and_from_stdin(
    weights: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, _ = expected(weights)
    (tmp_path / "p.txt").write_text(PROMPT + "\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    for name in (str(tmp_path / "p.txt"), "-"):
        assert generate.main(["--prompt-file", name, *SHORT]) == 0
        assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize("guide", ["mini", "folder"])
def test_guides(weights: Path, capsys: pytest.CaptureFixture[str], guide: str) -> None:
    """The embedded guide and the same one as a folder that transformers loads."""
    name = str(weights / "guider") if guide == "folder" else guide
    assert generate.main(["--prompt", PROMPT, *SHORT, "--guide", name, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    model, tokenizer = load_mini(weights / "llada")
    own = open_guide(name, "cpu", torch.float32, tokenizer)
    assert own.shared_vocabulary
    assert row["text"] == expected(weights, guide=own)[0]
    assert row["unmask"] == "guided" and row["guider_forwards"] >= 1


def test_words_that_the_model_does_not_know_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--prompt", "tom has a zebra", *SHORT]) == 0
    assert "mini does not know 2 words" in capsys.readouterr().err
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("tom has 3 eggs.", "tom has a zebra", "a")))
    assert generate.main(["--batch", str(path), "--out", str(tmp_path / "out.jsonl"), *SHORT]) == 0
    assert "mini does not know 3 words of 2 prompts, the first in line 2" in capsys.readouterr().err


WRONG = {
    "steps": (["--steps", "1"], "steps=1 do not reach gen_length=6"),
    "length": (["--gen-length", "0"], "has no gap; write <mask:8>"),
    "block": (["--block-length", "9"], "block_length=9 is longer than gen_length=6"),
    "cache": (["--cache", "freecash"], "did you mean freecache"),
    "cache method": (["--cache", "dual+kivi(4)"], "only freecache and block freeze slots for good"),
    "rule": (["--unmask", "treshold"], "did you mean threshold"),
    "method of the prompt": (["--cache", "freecache+h2o(0.5)"], "h2o needs evidence of the whole prompt"),
    "whole rows": (["--cache", "elastic+suffix(3)"], "elastic computes whole rows here and cannot leave slots out"),
    "gap": (["--infill", "tom has <mask:1000000000>"], "gaps of more than 1,048,576 tokens: no model has so many"),
    "long gap": (["--infill", f"tom has <mask:{'9' * 5000}>"], "gaps of more than 1,048,576 tokens"),
    "method of retrieval": (["--cache", "freecache+quest(0.5)"], "quest fetches tokens for each that is decoded"),
    "rule's sampling": (["--unmask", "random(sampling=3)"], "sampling=3 is nothing that a text can say"),
    "rule argument": (["--unmask", "guided('topk', k=0)", "--guide", "mini"], "k=0 is no number of tokens"),
    "no guide": (["--unmask", "guided"], "asks a guide and none is named; use --guide"),
    "idle guide": (["--unmask", "random", "--guide", "mini"], "asks no guide; use guided(...)"),
    "temperature": (["--temperature", "-1"], "argument --temperature: -1 is out of range; use 0"),
    "top-p": (["--top-p", "2"], "argument --top-p: 2 lies outside 0 to 1"),
    "cfg": (["--cfg", "-1"], "argument --cfg: -1 is out of range"),
    "model": (["--model", "./nowhere"], "'./nowhere' is no folder here; give one, mini or mini-dream"),
    "guide": (["--guide", "./nowhere"], "'./nowhere' is no folder here; give one, mini, or"),
    "device": (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    "out": (["--out", "x.jsonl"], "--out is for --batch"),
    "show and json": (["--show", "--json"], "both want the terminal; use --json FILE"),
    "empty": (["--prompt", "  "], "says nothing; give some text"),
    "no file": (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused_before_a_model_is_loaded(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "open_model", lambda *args: pytest.fail("a model was loaded"))
    more, message = WRONG[name]
    prompt = [] if any(x.startswith(("--prompt", "--infill")) for x in more) else ["--prompt", PROMPT]
    assert generate.main([*prompt, *SHORT, *more]) == 2
    assert message in capsys.readouterr().err


def test_a_diffusion_model_is_no_guide_and_a_guide_no_model(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--prompt", PROMPT, *SHORT, "--guide", str(weights / "dream")]) == 2
    assert "is a 'Dream' diffusion model; a guide reads from the left" in capsys.readouterr().err
    assert generate.main(["--prompt", PROMPT, *SHORT, "--model", str(weights / "guider")]) == 2
    assert "is a 'qwen2' model; diffusion models here are llada and Dream" in capsys.readouterr().err


def test_missing_weights_name_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (mini, sources):
        monkeypatch.setattr(module, "WEIGHTS", tmp_path)
    assert generate.main(["--prompt", PROMPT, *SHORT]) == 2
    assert "train them with `python -m training.dlm.train --model llada" in capsys.readouterr().err


BLOCKED = {
    "positions": (["--gen-length", "4000"], "need 4015 positions, the model has 2048; shorten the prompt or generate"),
    "mask": (["--prompt", "tom has <mask>"], "a prompt contains the mask token 2, which stands for what is to be"),
    "cache of other models": (["--cache", "block"], "cache block is for block-causal models"),
    "method and heads": (["--cache", "freecache+kivi(4,channels=5)"], "a group of 5 channels does not divide"),
    "method and layers": (["--cache", "freecache+minicache(start=9)"], "start=9: minicache governs 2 layers"),
    "rule and sampling": (
        ["--unmask", "ssd", "--temperature", "1"],
        "ssd with temperature=1.0: only the most",
    ),
    "rule and cache": (["--unmask", "wino", "--cache", "dkv"], "wino with cache dkv: a block's slots must be computed"),
    "rule and model": (
        ["--unmask", "wino", "--model", "mini-dream"],
        "needs a model whose rows predict their own",
    ),
    "suppressed": (
        ["--unmask", "random(suppress=(105,))"],
        "suppress=(105,): the model has tokens 0 to 104",
    ),
    "chat": (["--chat"], "no chat template, so its model is no chat model; give it plain text"),
    "guide's positions": (["--guide", "short"], "take 21 tokens and the guider has 20 positions; shorten the prompt"),
    "guide's offsets": (["--guide", "letters"], "ByT5Tokenizer gives no character offsets (is_fast is False); use a"),
    "guide's tokenizer": (["--guide", "silent"], "put its tokenizer.json into"),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_what_only_the_files_of_the_models_can_tell(
    name: str, weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by config and tokenizer alone, in one line."""
    for loader in ("open_model", "open_guide"):
        monkeypatch.setattr(generate, loader, lambda *args: pytest.fail("weights were loaded"))
    for guide in ("short", "silent"):
        shutil.copytree(weights / "guider", tmp_path / guide)
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    (tmp_path / "silent" / "tokenizer.json").unlink()
    GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=400).save_pretrained(tmp_path / "letters")
    (tmp_path / "letters" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    more, message = BLOCKED[name]
    more = [str(tmp_path / word) if word in ("short", "letters", "silent") else word for word in more]
    prompt = [] if "--prompt" in more else ["--prompt", PROMPT]
    assert generate.main([*prompt, *SHORT, *more]) == 2
    said = capfd.readouterr().err
    assert said.startswith("dlm.generate: ") and message in said and said.count("\n") == 1


def canvas_of(prompt: str, blocks: str) -> Canvas:
    """A canvas with blocks of four slots; `_` in `blocks` is a mask."""
    tokenizer = build_tokenizer()
    words = [tokenizer.mask_token if word == "_" else word for word in blocks.split()]
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    canvas = Canvas(
        ids, None, gen_length=len(words), block_length=4, mask_id=tokenizer.mask_token_id, shift=0
    )  # fmt: skip
    slots, tokens = canvas.answer_slots, torch.tensor([tokenizer.convert_tokens_to_ids(words)])
    canvas.commit(slots, tokens, torch.ones_like(slots, dtype=torch.bool))
    return canvas


def test_pieces_of_a_canvas() -> None:
    canvas = canvas_of("tom has 3", "7 apples . he _ _ 2 5 _ now _ </s>")
    assert pieces(canvas, build_tokenizer()) == [
        ("frozen", "7 apples. he"),
        ("active mask", "▒▒"),
        ("active", " 25"),
        ("mask", "░"),
        ("ahead", " now"),
        ("mask", "░"),
        ("end", "·"),
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_canvas_is_drawn(terminal: bool) -> None:
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=terminal, color_system="standard", width=60, height=12)
    with Painter(build_tokenizer(), "tom has 3", console) as painter:
        painter(canvas_of("tom has 3", "7 apples . he _ _ 2 5"), Stats(forwards=3))
    said = drawn.getvalue()
    if not terminal:
        assert said == "forward 3, 6 of 8 tokens: 7 apples. he__ 25\n"
        return
    styles = {"frozen": "\x1b[32m", "active mask": "\x1b[33m", "active": "\x1b[1;30;43m", "prompt": "\x1b[2m"}
    for name, text in (("prompt", "tom has 3"), ("frozen", "7 apples. he"), ("active mask", "▒▒"), ("active", " 25")):
        assert styles[name] + text in said, name


def test_a_large_canvas_keeps_its_end_in_sight() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=20, height=6)
    painter = Painter(build_tokenizer(), "tom " * 60, console)
    painter(canvas_of("tom", "7 " * 60 + "_ _ _ _"), Stats())
    assert painter.prompt.startswith("…") and len(painter.prompt) == 161
    assert len(painter.picture().plain.splitlines()[0]) == 40 and "▒▒▒▒" in painter.picture().plain


def test_show_without_a_terminal_is_plain_text(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--prompt", PROMPT, *SHORT, "--show", "--eos", "none"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and lines[0].startswith("forward 1, 1 of 6 tokens: ") and "\x1b" not in "".join(lines)
    assert lines[-1] == expected(weights, eos="none")[0]


def prompts_file(path: Path) -> list[str]:
    prompts = [PROMPT, "how many pears has ann? she had 20.", "the bus has 12 people.", "5 nails", "tom has 11 eggs."]
    lines = [json.dumps({"prompt": p} | ({"id": "b"} if i == 1 else {})) for i, p in enumerate(prompts)]
    path.write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    return prompts


def test_a_file_of_prompts_and_its_resume(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_file(tmp_path / "in.jsonl")
    argv = ["--batch", str(tmp_path / "in.jsonl"), *SHORT, "--batch-size", "2", "--temperature", "0.5"]
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert generate.main([*argv, "--out", str(whole)]) == 0
    assert "5 answers written" in capsys.readouterr().out
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts and [row["line"] for row in rows] == [1, 3, 4, 5, 6]
    assert [row.get("id") for row in rows] == [None, "b", None, None, None]
    # Killed in the middle of the fourth answer: the torn line goes, its batch is written again.
    lines = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[:3]) + lines[3][:20])
    assert generate.main([*argv, "--out", str(cut)]) == 0
    assert "2 answers written" in capsys.readouterr().out and cut.read_text() == whole.read_text()
    monkeypatch.setattr(generate, "open_model", lambda *args: pytest.fail("a model was loaded"))
    assert generate.main([*argv, "--out", str(cut)]) == 0
    assert "all 5 answers are in" in capsys.readouterr().out
    assert generate.main([*argv, "--out", str(cut), "--seed", "1"]) == 2
    assert "cut.jsonl:1 was written with other settings" in capsys.readouterr().err


def test_rows_of_a_batch_are_what_they_are_alone(weights: Path, tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path / "in.jsonl")
    argv = ["--batch", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"), *SHORT, "--stats"]
    assert generate.main(argv) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [expected(weights, prompt=p)[0] for p in prompts]
    assert rows[0]["batch"] == 5 and rows[0]["query_tokens"] == rows[4]["query_tokens"] > 0


BAD_FILES = {
    "no json": ('{"prompt": "a"}\nnonsense\n', "in.jsonl:2: not JSON"),
    "neither": ('{"text": "a"}\n', 'in.jsonl:1: needs "prompt" or "messages"'),
    "empty prompt": ('{"prompt": " "}\n', 'in.jsonl:1: "prompt" is " "; give a text that is not empty'),
    "messages": ('{"messages": [{"role": "user"}]}\n', 'must be a list of objects with "role" and "content"'),
    "nothing": ("\n", "in.jsonl has no prompts"),
    "mask": ('{"prompt": "tom"}\n{"prompt": "<mask>"}\n', "in.jsonl:2: a prompt contains the mask token"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_of_prompts(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / "in.jsonl").write_text(content)
    argv = ["--batch", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "o.jsonl"), *SHORT, "--strict"]
    assert generate.main(argv) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "o.jsonl").exists()


def test_batch_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts_file(tmp_path / "in.jsonl")
    batch = ["--batch", str(tmp_path / "in.jsonl"), *SHORT]
    out = ["--out", str(tmp_path / "o.jsonl")]
    for more, message in (
        ([], "--batch needs --out"),
        ([*out, "--show"], "are for one prompt"),
        ([*out, "--batch-size", "0"], "0 is not a count; use 1"),
        (["--out", str(tmp_path / "in.jsonl")], "is there and not of python -m dlm.generate"),
    ):
        assert generate.main([*batch, *more]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "o.jsonl").write_text('{"text": "mine"}\n')
    assert generate.main([*batch, *out]) == 2
    assert "o.jsonl is there and not of python -m dlm.generate" in capsys.readouterr().err


def test_ctrl_c_says_what_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts_file(tmp_path / "in.jsonl")
    calls = []

    def stopping(*args: object):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode_prompts(*args)

    monkeypatch.setattr(generate, "decode_prompts", stopping)
    argv = ["--batch", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "o.jsonl"), *SHORT, "--batch-size", "2"]
    assert generate.main(argv) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 2


def test_padding() -> None:
    ids, mask = pad_left([[1, 2, 3], [4], []], 9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4], [9, 9, 9]] and mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
