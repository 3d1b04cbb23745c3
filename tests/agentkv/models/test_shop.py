"""An episode of every family on the shop: pages with links, a form and a server that knows what was ordered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from agentkv import run
from agentkv.agent import Agent
from agentkv.envs.actions import Action, Click, Finished, Several, Type
from agentkv.envs.browser import Browser
from agentkv.envs.shop import Shop
from agentkv.models import AGENTS
from tests.agentkv.models.tiny import Scripted, tiny

THANKS = "Order placed: 1 x teapot"


def purchase(envs: list[Any]) -> Iterator[Action]:
    """Pointer and keyboard alone, as every grammar has them; places are asked of the page when their turn comes."""

    def at(selector: str) -> Click:
        box = envs[-1].page.locator(selector).first.bounding_box()
        return Click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)

    yield at("text=teapot")
    yield at("#add")
    yield at("#checkout")
    # one grammar ends every text with Enter: the form waits until all of it is filled in
    yield Several((at("[name=name]"), Type("Ada\n")))
    yield Several((at("[name=street]"), Type("Elm 7\n")))
    yield at("[name=terms]")
    yield at("#order")
    yield Finished()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser(machine_fonts=True) as browser:
        yield browser


@pytest.mark.browser
@pytest.mark.parametrize("family", AGENTS)
def test_the_family_buys_a_teapot(
    family: str, browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs: list[Any] = []
    speaker = Scripted(tiny(AGENTS[family]), purchase(envs))
    monkeypatch.setattr(Agent, "start", lambda self, env: envs.append(env))
    monkeypatch.setattr(run, "load", lambda plan: speaker)
    monkeypatch.setattr(run, "open_browser", lambda args, plan: nullcontext(browser))
    out = tmp_path / "run"
    with Shop() as shop:
        asked = [
            "--url",
            shop.url,
            "--goal",
            "Buy a teapot.",
            "--expect",
            THANKS,
            "--method",
            "gui-kv",
            "--history",
            "2",
        ]
        assert run.main([*asked, "--out", str(out)]) == 0
        assert [(order["lines"][0][:2], order["name"], order["street"]) for order in shop.orders] == [
            ((1, "teapot"), "Ada", "Elm 7")
        ]
    lines = [json.loads(line) for line in next(out.rglob("steps.jsonl")).read_text().splitlines()]
    assert [line["error"] for line in lines] == [""] * 8 and lines[-1]["success"]
    assert all(line["text"] == said.strip() for line, said in zip(lines, speaker.said, strict=True))
