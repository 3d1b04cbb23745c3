"""Files of prompts: what ends a line, what becomes of bad ones, and whose files are left alone."""

from __future__ import annotations

import json
import time

import pytest

from dlm import generate, sources
from dlm.batch import Item, answer_all, read_done, read_items

GOOD = {"prompt": "tom has 3 apples."}


def answers(items: list[Item]) -> list[dict]:
    return [{"text": item.prompt.upper()} for item in items]


def test_lines_end_at_line_feeds_only(tmp_path):
    texts = ["a\u2028b", "c\u2029d", "e\u0085f", "g\x0bh\x1ci"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "in").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    items = read_items(tmp_path / "in")
    assert [item.prompt for item in items] == texts and [item.line for item in items] == [1, 2, 3, 4]
    assert answer_all(items, tmp_path / "out", 2, "s", answers) == 4
    assert read_done(tmp_path / "out", items, "s") == {1, 2, 3, 4}


def test_a_bad_line_is_a_row_with_its_error_and_the_rest_runs(tmp_path):
    bad = [b"nonsense", b'{"prompt": "\xff"}', b"[" * 100_000, b'{"text": "a"}', b'{"prompt": " "}']
    bad += [b'{"prompt": "half \\ud83d"}', b'{"prompt": "a", "id": ["\\udc00"]}']
    (tmp_path / "in").write_bytes(b"\n".join([json.dumps(GOOD).encode(), *bad, b"", json.dumps(GOOD).encode()]))
    items = read_items(tmp_path / "in")
    assert answer_all(items, tmp_path / "out", 3, "s", answers) == 9
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [row["line"] for row in rows] == [*range(1, 9), 10]
    assert ["error" in row for row in rows] == [0] + [1] * 7 + [0]
    assert rows[6]["error"] == "holds '\\ud83d', which is half a character; write it whole"
    assert answer_all(items, tmp_path / "out", 3, "s", answers) == 0
    with pytest.raises(ValueError, match="in:2: not JSON"):
        read_items(tmp_path / "in", strict=True)


@pytest.mark.parametrize(
    "content",
    [b"hello", b"hello\n", b'{"line": 1}', b'{"line": 9, "prompt": "x', b"\xff\xfe\x00", b"\n", b'{"text": "mine"}\nx'],
)
def test_a_file_that_is_not_ours_is_left_as_it_is(content, tmp_path):
    (tmp_path / "out").write_bytes(content)
    with pytest.raises(ValueError, match="out:[12] is no answer of this command; give another --out"):
        answer_all([Item(1, "tom")], tmp_path / "out", 2, "s", answers)
    assert (tmp_path / "out").read_bytes() == content


@pytest.mark.parametrize("cut", [1, 5, 14, 40])
def test_a_torn_end_of_ours_is_written_again(cut, tmp_path):
    items = [Item(1, "tom"), Item(2, "ann", id="b"), Item(3, "\u00e9\u00e8" * 9)]
    answer_all(items, tmp_path / "whole", 2, "s", answers)
    content = (tmp_path / "whole").read_bytes()
    lines = content.splitlines(keepends=True)
    for kept in (0, 1, 2):
        (tmp_path / "out").write_bytes(b"".join(lines[:kept]) + lines[kept][:cut])
        assert answer_all(items, tmp_path / "out", 2, "s", answers) == 3 - kept
        assert (tmp_path / "out").read_bytes() == content


def test_bad_lines_alone_need_no_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "open_model", lambda *args: pytest.fail("weights were read"))
    (tmp_path / "in").write_bytes(b'nonsense\n{"prompt": "tom <mask>"}\n{"text": "a"}\n')
    argv = ["--batch", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--gen-length", "4", "--device", "cpu"]
    assert generate.main(argv) == 0
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [row["line"] for row in rows] == [1, 2, 3] and all("error" in row and "text" not in row for row in rows)
    assert "3 lines could not be answered" in capsys.readouterr().err


def test_a_batch_of_which_only_bad_lines_are_missing_is_not_answered_again(tmp_path):
    items = [Item(1, "tom"), Item(2, None, error="is no prompt"), Item(3, "ann")]
    answer_all(items, tmp_path / "whole", 3, "s", answers)
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    (tmp_path / "out").write_bytes(lines[0] + lines[2])
    assert answer_all(items, tmp_path / "out", 3, "s", lambda chunk: pytest.fail("asked again")) == 1
    assert b"is no prompt" in (tmp_path / "out").read_bytes()


def test_answers_go_where_a_link_leads(tmp_path):
    """Also into folders that are not there yet: found at the first answer, the work would be lost."""
    (tmp_path / "file").symlink_to(tmp_path / "new" / "deep" / "out")
    (tmp_path / "folder").symlink_to(tmp_path / "other")
    for out in (tmp_path / "file", tmp_path / "folder" / "out"):
        assert answer_all([Item(1, "tom")], out, 1, "s", answers) == 1
    assert (tmp_path / "file").is_symlink()
    assert (tmp_path / "new" / "deep" / "out").read_bytes() == (tmp_path / "other" / "out").read_bytes() != b""


def test_an_unreachable_hub_is_one_line_at_once(capfd, monkeypatch):
    monkeypatch.setattr(sources.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    sources._try_hub.cache_clear()
    # The hub's client waits between its tries; with none of them the answer comes within our own patience.
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waited {seconds} s"))
    assert generate.main(["--model", "nobody/nothing-there", "--prompt", "tom"]) == 2
    assert sources.HUB_PATIENCE < 5
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "cannot be had from the hub" in said
    sources._try_hub.cache_clear()
