"""The fuzz command: a small run of each grammar passes, and what it reports is what happened."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from agentkv.grammars import fuzz
from agentkv.grammars.base import ParseError


@pytest.mark.parametrize("grammar", fuzz.GRAMMARS)
def test_a_small_run(grammar: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--count", "400", "--grammar", grammar, "--seed", "7"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["grammar"] == grammar and report["strings"] == 400 and report["exceptions"] == []
    assert report["actions"] > 40 and report["actions"] + sum(report["errors"].values()) == 400
    assert 0 < report["slowest_ms"] < fuzz.LIMIT_MS
    assert len(report["errors"]) > 10


def stub(parse: object) -> SimpleNamespace:
    return SimpleNamespace(parse=parse, parse_all=parse, render=fuzz.ui_tars.render)


def test_an_exception_fails_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(text: str, frame: object) -> None:
        raise IndexError("out of range")

    monkeypatch.setitem(fuzz.GRAMMARS, "ui_tars", stub(broken))
    assert fuzz.main(["--count", "3", "--grammar", "ui_tars"]) == 1
    assert "IndexError: out of range" in json.loads(capsys.readouterr().out)["exceptions"][0]


def test_a_slow_reading_fails_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fuzz, "LIMIT_MS", 0.0)
    monkeypatch.setitem(fuzz.GRAMMARS, "ui_tars", stub(lambda text, frame: ParseError(str(sum(range(20_000))))))
    assert fuzz.main(["--count", "3", "--grammar", "ui_tars"]) == 1
    assert json.loads(capsys.readouterr().out)["slowest_ms"] > 0


def test_reasons_are_counted_without_their_details() -> None:
    assert fuzz.reason_class("'it\\'s' is not a key") == "... is not a key"
    assert fuzz.reason_class("x=-40.5 is outside the image of 280 pixels") == "x=N is outside the image of N pixels"


def test_a_count_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--count", "0"]) == 2
    assert "argument --count: 0 is not a count" in capsys.readouterr().err
