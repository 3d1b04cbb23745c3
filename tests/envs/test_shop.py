"""The shop: a script buys through real events, and both the page and the server know what was bought."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from agentkv.envs import live
from agentkv.envs.actions import Action, Click, Finished, Hotkey, Type
from agentkv.envs.browser import Browser
from agentkv.envs.shop import Shop
from agentkv.envs.web import WebEnv

SIZE = (900, 600)
ORDER = "Order placed: 2 x teapot (blue) for Ada, Elm 7, collected."


@pytest.fixture(scope="module")
def shop() -> Iterator[Shop]:
    with Shop() as opened:
        yield opened


def at(env: WebEnv, selector: str) -> Click:
    box = env.page.locator(selector).first.bounding_box()
    return Click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


def purchase(env: WebEnv, thing: str) -> Iterator[Action]:
    yield at(env, "#search")
    yield Type(thing)
    yield at(env, f"text={thing}")
    yield at(env, "#colour")
    yield Type("b")
    yield Hotkey(("Enter",))
    yield at(env, "#count")
    yield Hotkey(("Control", "a"))
    yield Type("2")
    yield at(env, "#add")
    yield at(env, "#checkout")
    yield at(env, "[name=name]")
    yield Type("Ada")
    yield at(env, "[name=street]")
    yield Type("Elm 7")
    yield at(env, "[value=collected]")
    yield at(env, "[name=terms]")
    yield at(env, "#order")
    yield Finished("done")


@pytest.mark.browser
@pytest.mark.parametrize(("thing", "solved"), [("teapot", True), ("plate", False)])
def test_what_was_ordered_decides(browser: Browser, shop: Shop, thing: str, solved: bool) -> None:
    checker = live.page_says(ORDER.upper())
    env = live.make(shop.url, "Order two blue teapots.", browser, viewport=SIZE, checker=checker)
    env.reset(seed=0)
    for action in purchase(env, thing):
        *_, info = env.step(action)
        assert not info["error"] and not info["blocked"]
    assert info["success"] is solved
    assert shop.orders[-1]["lines"] == [(2, thing, "blue")] and shop.orders[-1]["name"] == "Ada"
    env.close()


@pytest.mark.browser
def test_every_episode_starts_with_an_empty_basket(browser: Browser, shop: Shop) -> None:
    env = live.make(shop.url.replace("index", "item"), "Buy.", browser, viewport=SIZE)
    for seed in range(2):
        env.reset(seed=seed)
        assert env.page.inner_text("#to-basket") == "Basket (0)"
        env.step(at(env, "#add"))
        assert env.page.inner_text("#to-basket") == "Basket (1)"
    env.step(at(env, "text=Remove"))
    assert env.page.inner_text("#total") == "0.00"
    env.close()


@pytest.mark.parametrize("form", [b"", b"basket=%5B%5D&name=a&street=b&delivery=c", b"basket=nonsense&name=a"])
def test_nonsense_is_no_order(shop: Shop, form: bytes) -> None:
    before = len(shop.orders)
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(shop.url.replace("index.html", "order"), form)
    assert len(shop.orders) == before


def test_an_empty_expectation_is_refused() -> None:
    with pytest.raises(ValueError, match="expected text is empty"):
        live.page_says("  ")
