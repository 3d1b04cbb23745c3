"""Beside kvpress: our side of the work, what is made of both sides' lines, and that its side stands alone.

`kvpress_kept.json` holds what kvpress kept of one prompt; `python -m tests.eval.test_peers` records it again.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

from eval.peers import __main__ as command
from eval.peers import compare, our_side, place
from eval.peers.pairs import FULL, PAIRS
from eval.ruler import Maker
from eval.textbench import load_text_model
from textkv import resolve_method

SHORT = 384
RECORDED = Path(__file__).with_name("kvpress_kept.json")
SAME = ["snapkv", "adakv", "expected", "keydiff", "knorm", "tova", "streaming_llm"]


def job(methods, budgets=(0.5,), n=1):
    tokenizer = load_text_model("mini")[1]
    return compare.job_of("mini", methods, budgets, Maker(tokenizer, SHORT), ["needle"], n, 1)


@pytest.mark.parametrize("name", PAIRS)
def test_our_half_of_every_pair_is_a_method(name):
    assert resolve_method(PAIRS[name].ours, "0.5") is not None


def test_our_side_answers_as_transformers_does_and_tells_what_is_kept():
    told, _ = job(["snapkv", "adakv"], (0.5, 1.0))
    lines = list(our_side.lines(load_text_model("mini")[0], told))
    dynamic, full, *others = lines
    assert dynamic["method"] == our_side.DYNAMIC and full["method"] == FULL
    assert dynamic["said"] == full["said"]
    for line in others:
        assert {len(heads) for heads in line["kept"]} == {2}  # the mini model's KV heads
        for heads in line["kept"]:
            kept = sum(map(len, heads)) / len(heads)
            assert kept == pytest.approx(line["budget"] * SHORT, abs=1)
        if line["budget"] == 1.0:
            assert line["said"] == full["said"]


def test_rows_are_beside_the_full_cache_of_their_own_side():
    tokenizer = load_text_model("mini")[1]
    said = tokenizer("1234", add_special_tokens=False)["input_ids"]
    full = {"prompt": 0, "method": FULL, "budget": 1.0, "said": [], "kv_bytes": 100, "read": 2.0, "step": 1.0}
    half = full | {"method": "snapkv", "budget": 0.5, "said": said, "kv_bytes": 50, "read": 3.0}
    lost = {"prompt": 0, "method": "tova", "budget": 0.5, "refused": "AssertionError: short"}
    rows = compare.rows_of("kvpress", [full, half, lost], ["1234"], tokenizer)
    assert [(row["method"], row.get("recall")) for row in rows] == [(FULL, 0.0), ("snapkv", 1.0), ("tova", None)]
    assert rows[1]["kv_share"] == 0.5 and rows[1]["read_ratio"] == 1.5 and rows[1]["step_ratio"] == 1.0
    assert rows[2]["refused"] == "AssertionError: short"
    assert len(compare.table(rows).rows) == 3


def test_overlap_counts_pairs_of_head_and_token_in_each_layer():
    ours = [{"kept": [[[0, 1], [0, 1]], [[3], [4]]]}]
    theirs = [{"kept": [[[0, 1], [1, 2]], [[3], [4]]]}]
    assert compare.overlap(ours, theirs) == pytest.approx((3 / 4 + 1) / 2)
    assert compare.overlap([{}], [{}]) is None


@pytest.mark.parametrize("name", SAME)
def test_what_is_kept_is_what_kvpress_kept(name):
    told, _ = job(SAME)
    recorded = {line["method"]: line["kept"] for line in json.loads(RECORDED.read_text())}
    pairs = [pair for pair in told["pairs"] if pair["name"] == name]
    (_, line) = our_side.lines(load_text_model("mini")[0], told | {"pairs": pairs})
    # A tie at the edge of the budget may go to another token on another machine.
    assert compare.overlap([line], [{"kept": recorded[name]}]) >= 0.995


def test_the_other_side_imports_nothing_of_ours():
    tree = ast.parse(compare.SIDE.read_text(encoding="utf-8"))
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in found if name not in sys.stdlib_module_names} == {"kvpress", "torch", "transformers"}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--methods", "minicache"], "minicache"),
        (["--budgets", "2"], "2"),
        (["--tasks", ","], ""),
        ([], place.COMMAND),  # nothing is measured before the environment is there
    ],
)
def test_wrong_requests_are_one_line(wrong, says, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(place, "folder", lambda: tmp_path)
    try:
        code = command.main(["compare", *wrong])
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and says in said[-1]


@pytest.mark.skipif(not (place.folder() / "ready").is_file(), reason=f"kvpress is not installed: {place.COMMAND}")
def test_both_sides_keep_the_same_tokens():
    rows = compare.compared("mini", ["snapkv", "keydiff", "tova"], [0.5], SHORT, ["needle"], 1, 1, None)
    shares = [row["overlap"] for row in rows if row["library"] == compare.OURS and row["method"] != FULL]
    assert shares == pytest.approx([1.0] * 3, abs=0.005)


def record() -> None:
    """Write what kvpress keeps."""
    lines = [line for line in compare.peer_lines(job(SAME)[0]) if "kept" in line]
    RECORDED.write_text(json.dumps([{"method": line["method"], "kept": line["kept"]} for line in lines]) + "\n")


if __name__ == "__main__":
    record()
