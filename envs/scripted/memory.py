"""Scripts for our memory pages: they keep what they saw, because the page no longer has it when it is asked."""

from __future__ import annotations

from collections.abc import Iterator

from ..actions import Action, Type
from ..scripted.look import Look

_NEXT = ".next"


def _figures(look: Look) -> list[str]:
    return [figure["data-label"] for figure in look.visible("svg[data-label]")]


def code(look: Look) -> Iterator[Action]:
    """Remembers the letters of all cards, and types or clicks them."""
    seen = [card.text for card in look.visible(".glyph")]
    while look.visible(_NEXT):
        yield look.click(look.one(_NEXT))
    if look.visible("input"):
        yield look.click(look.one("input"))
        yield Type("".join(seen))
        yield look.click(look.one("button"))
        return
    for digit in seen:
        yield look.click(look.one("button", lambda key, digit=digit: key.text == digit))


def changed(look: Look) -> Iterator[Action]:
    """Clicks the figure that is another than before."""
    before = _figures(look)
    yield look.click(look.one(_NEXT))
    for old, figure in zip(before, look.visible("svg[data-label]"), strict=True):
        if figure["data-label"] != old:
            yield look.click(figure)
            return


def colour(look: Look) -> Iterator[Action]:
    """Clicks the colour of the first page, and again as long as another round begins."""
    while look.visible(_NEXT):
        seen = look.one("[data-colour]")["data-colour"]
        while look.visible(_NEXT):
            yield look.click(look.one(_NEXT))
        yield look.click(look.one("[data-colour]", lambda swatch, seen=seen: swatch["data-colour"] == seen))


def place(look: Look) -> Iterator[Action]:
    """Clicks the field that the first page showed."""
    wanted = look.one("[data-field]")["data-field"]
    while look.visible(_NEXT):
        yield look.click(look.one(_NEXT))
    yield look.click(look.visible("button")[int(wanted)])


def order(look: Look) -> Iterator[Action]:
    """Clicks the figures in the order in which the pages showed them, or the first alone."""
    seen = []
    while look.visible(_NEXT):
        seen += _figures(look)
        yield look.click(look.one(_NEXT))
    for label in seen[:1] if "first" in look.goal else seen:
        yield look.click(look.one("svg[data-label]", lambda figure, label=label: figure["data-label"] == label))


SCRIPTS = {
    "memory-code": code,
    "memory-code-3": code,
    "memory-code-long": code,
    "memory-code-typed": code,
    "memory-changed": changed,
    "memory-colour": colour,
    "memory-colour-long": colour,
    "memory-colour-rounds": colour,
    "memory-place": place,
    "memory-order": order,
    "memory-first": order,
}
