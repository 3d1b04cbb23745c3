"""Scripts for MiniWoB++ pages: each reads the goal and the live page, as a person would, and yields one action at a
time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..actions import Action, Type
from ..scripted.look import Element, Look

_SUBMIT = "#subbtn"
_SHAPE_TAGS = {"rect": "rectangle", "circle": "circle", "polygon": "triangle"}
_COLOURS = ("red", "green", "blue", "aqua", "black", "magenta", "yellow")


def _quoted(look: Look) -> list[str]:
    return re.findall(r'"([^"]*)"', look.goal)


def _enter(look: Look, selector: str, text: str) -> Iterator[Action]:
    yield look.click(look.one(selector))
    yield Type(text)


def press(look: Look) -> Iterator[Action]:
    """The button that the goal names in quotes; without quotes the first one of the page."""
    names = _quoted(look)
    yield look.click(look.one("#area button", lambda button: not names or button.text == names[0]))


def sequence(look: Look) -> Iterator[Action]:
    """Button one, then button two."""
    yield look.click(look.one("#subbtn"))
    yield look.click(look.one("#subbtn2"))


def tab(look: Look) -> Iterator[Action]:
    """The tab whose number the goal names."""
    name = re.search(r"Tab #\d", look.goal)
    assert name is not None
    yield look.click(look.one("#area ul a", lambda link: link.text == name[0]))


def link_in_tabs(look: Look) -> Iterator[Action]:
    """Goes through the tabs until one has the link."""
    name = _quoted(look)[0]
    heads = look.visible("#area ul a")
    for number in range(len(heads) + 1):
        links = look.visible(".alink", lambda link: link.text == name)
        if links:
            yield look.click(links[0])
            return
        yield look.click(look.visible("#area ul a")[number])


def link(look: Look) -> Iterator[Action]:
    """The link of the quoted text."""
    name = _quoted(look)[0]
    yield look.click(look.one(".alink", lambda element: element.text == name))


def close_dialog(look: Look) -> Iterator[Action]:
    """The cross of the dialog."""
    yield look.click(look.one(".ui-dialog-titlebar button"))


def dialog(look: Look) -> Iterator[Action]:
    """The button of the quoted name, or the cross."""
    name = _quoted(look)[0]
    if name == "x":
        yield from close_dialog(look)
    else:
        yield look.click(look.one(".ui-dialog-buttonset button", lambda button: button.text == name))


def colour(look: Look) -> Iterator[Action]:
    """The box of the colour that the goal names."""
    wanted = look.goal.split()[3]
    yield look.click(look.one("#area .color", lambda box: box["data-color"] == wanted))


def _shape_fits(element: Element, words: list[str]) -> bool:
    """`words`: an optional size, an optional colour, then a kind or the very character."""
    size = max(element.box[2:]) if element.tag in _SHAPE_TAGS else float(element["font-size"].removesuffix("px"))
    large = size > 15
    for word in words[:-1]:
        if word in ("large", "small"):
            if large != (word == "large"):
                return False
        elif element["fill"] != word:
            return False
    kind = _SHAPE_TAGS.get(element.tag, "digit" if element.text.isdigit() else "letter")
    return words[-1] in ("item", kind, element.text) or (words[-1] == "shape" and element.tag in _SHAPE_TAGS)


def shape(look: Look) -> Iterator[Action]:
    """The shape that fits the goal's words."""
    words = look.goal.removeprefix("Click on a ").split()
    yield look.click(look.one("#area_svg *", lambda element: _shape_fits(element, words)))


def count(look: Look) -> Iterator[Action]:
    """The button with the number of the shapes that fit."""
    words = look.goal.removeprefix("How many ").removesuffix("s are there?").split()
    number = sum(_shape_fits(element, words) for element in look.all("#area_svg *"))
    yield look.click(look.one("#count-buttons button", lambda button: button.text == str(number)))


def identify(look: Look) -> Iterator[Action]:
    """The button that says what kind of figure is drawn."""
    figure = look.all("#area_svg *")[0]
    kind = _SHAPE_TAGS.get(figure.tag, "digit" if figure.text.isdigit() else "letter")
    yield look.click(look.one("#area-buttons button", lambda button: button["data-type"] == kind))


def widget(look: Look) -> Iterator[Action]:
    """The widget of the quoted kind."""
    kind = _quoted(look)[0]
    yield look.click(look.one(f'.widget [data-type="{kind}"]'))


def tick(look: Look) -> Iterator[Action]:
    """Boxes or radio buttons whose labels the goal lists, then Submit."""
    names = look.goal.removeprefix("Select ").removesuffix(" and click Submit.").split(", ")
    for name in names:
        for number, label in enumerate(look.all("#boxes label")):
            if label.text == name:
                yield look.click(look.all("#boxes input")[number])
    yield look.click(look.one(_SUBMIT))


def expand(look: Look) -> Iterator[Action]:
    """Opens the section, then submits."""
    yield look.click(look.one("#area h3"))
    yield look.click(look.one(_SUBMIT))


def grid(look: Look) -> Iterator[Action]:
    """The dot at the goal's coordinates."""
    place = re.search(r"\(.*?\)", look.goal)
    assert place is not None
    yield look.click(look.one("circle", lambda dot: dot["id"] == place[0]))


def focus(look: Look) -> Iterator[Action]:
    """The text field that the goal counts to; the only one if it counts none."""
    number = re.search(r"the (\d)", look.goal)
    yield look.click(look.visible("#area input")[int(number[1]) - 1 if number else 0])


def text(look: Look) -> Iterator[Action]:
    """Types the quoted word, in the case that the goal asks for."""
    word = _quoted(look)[0]
    word = word.upper() if "upper case" in look.goal else word.lower() if "lower case" in look.goal else word
    yield from _enter(look, "#tt", word)
    yield look.click(look.one(_SUBMIT))


def password(look: Look) -> Iterator[Action]:
    """Types the password into both fields."""
    for field in ("#password", "#verify"):
        yield from _enter(look, field, _quoted(look)[0])
    yield look.click(look.one(_SUBMIT))


def login(look: Look) -> Iterator[Action]:
    """Types name and password."""
    for field, word in zip(("#username", "#password"), _quoted(look), strict=True):
        yield from _enter(look, field, word)
    yield look.click(look.one(_SUBMIT))


def arithmetic(look: Look) -> Iterator[Action]:
    """Types the result."""
    left, sign, right = look.all("#math-problem")[0].text.removesuffix("=").split()
    a, b = int(left), int(right)
    yield from _enter(look, "#math-answer", str({"+": a + b, "-": a - b, "x": a * b}[sign]))
    yield look.click(look.one(_SUBMIT))


def algebra(look: Look) -> Iterator[Action]:
    """Solves for x and types it."""
    left, sign, right, _, result = look.all("#math-problem")[0].text.split()
    total = int(result)
    if left == "x":
        answer = total - int(right) if sign == "+" else total + int(right)
    else:
        answer = total - int(left) if sign == "+" else int(left) - total
    yield from _enter(look, "#math-answer", str(answer))
    yield look.click(look.one(_SUBMIT))


SCRIPTS = {
    "click-test": press,
    "click-test-2": lambda look: iter([look.click(look.one(_SUBMIT))]),
    "click-button": press,
    "click-button-sequence": sequence,
    "click-tab": tab,
    "click-tab-2": link_in_tabs,
    "click-link": link,
    "click-dialog": close_dialog,
    "click-dialog-2": dialog,
    "click-color": colour,
    "click-shape": shape,
    "click-widget": widget,
    "click-option": tick,
    "click-checkboxes": tick,
    "click-checkboxes-transfer": tick,
    "click-collapsible": expand,
    "count-shape": count,
    "identify-shape": identify,
    "grid-coordinate": grid,
    "focus-text": focus,
    "focus-text-2": focus,
    "enter-text": text,
    "enter-text-2": text,
    "enter-text-dynamic": text,
    "enter-password": password,
    "login-user": login,
    "simple-arithmetic": arithmetic,
    "simple-algebra": algebra,
}
