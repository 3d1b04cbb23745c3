"""The command that compares fixed screens with their record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from agentkv.envs import pixels
from agentkv.envs.browser import Browser

NOW = {"chromium": "1", "machine": "Linux x86_64", "screens": {"a": "00", "b": "11"}}


@pytest.mark.parametrize(
    ("then", "expected"),
    [
        ({}, ["same", "same"]),
        ({"screens": {"a": "00", "b": "22"}}, ["same", "different"]),
        ({"screens": {"a": "00"}}, ["same", "not recorded"]),
        ({"chromium": "2"}, ["same", "same"]),
        ({"chromium": "2", "screens": {"a": "00", "b": "22"}}, ["same", "other Chromium"]),
        ({"machine": "Darwin arm64", "screens": {"a": "33", "b": "11"}}, ["other machine", "same"]),
    ],
)
def test_verdicts(then: dict, expected: list[str]) -> None:
    assert list(pixels.compare(NOW, NOW | then).values()) == expected


def test_a_hash_tells_size_and_pixels() -> None:
    shots = {"wide": np.zeros((1, 4, 3), np.uint8), "high": np.zeros((4, 1, 3), np.uint8)}
    shots["light"] = shots["wide"] + np.uint8(1)
    assert len(set(pixels.record(shots, "1")["screens"].values())) == 3


def test_the_record_holds_the_twenty_screens() -> None:
    assert list(json.loads(pixels.RECORD.read_text())["screens"]) == pixels.names()
    assert len(pixels.names()) == 20


@pytest.mark.browser
def test_the_command(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pixels, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(pixels, "names", lambda: ["memory-code", "controls"])
    assert pixels.main(["--write"]) == 0
    assert "2 of 2 screens are the same" in capsys.readouterr().out
    record = json.loads(pixels.RECORD.read_text())
    record["screens"]["controls"] = "0"
    pixels.RECORD.write_text(json.dumps(record))
    assert pixels.main([]) == 1
    assert "different" in capsys.readouterr().out
    pixels.RECORD.write_text(json.dumps(record | {"chromium": "1.2.3"}))
    assert pixels.main([]) == 0
    assert "recorded by Chromium 1.2.3" in capsys.readouterr().out
