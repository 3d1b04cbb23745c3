"""Drawn pages: the curriculum of the mini model that needs no browser.

Each page is a 160 x 210 picture in the style of a small web page (query box, buttons, fields, tick boxes, tabs,
coloured boxes, shapes, plain words) with many questions about it: where is it, what is written there, which colour,
copy this. It teaches places, colours and reading before, and beside, the oracle episodes on real pages.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from agentkv.envs import fonts
from training.agent.packing import Ask, Turn
from training.agent.shape import RESIZED, SCREEN
from training.agent.words import COLORS, ORDINALS, SHAPES, WORDS

WIDTH, HEIGHT = SCREEN
QUERY_HEIGHT = 50
STEP = 4
# questions per page that only ask to copy words: no picture is needed, but the way from goal to answer is learned late
COPIES = 3

_STYLES = {"plain": "Regular", "bold": "Bold"}
_GREY, _LINE, _BLUE = (239, 239, 239), (118, 118, 118), (0, 117, 255)


@lru_cache(maxsize=256)
def face(size: int, weight: str) -> ImageFont.FreeTypeFont:
    """The sans face that pages have, in "plain" or "bold", `size` pixels high."""
    # the basic layout: Pillow has the other one only where the machine brings a library for it
    return ImageFont.truetype(str(fonts.face("sans", _STYLES[weight])), size, layout_engine=ImageFont.Layout.BASIC)


def click(x: float, y: float, size: tuple[int, int] = (WIDTH, HEIGHT)) -> str:
    """The answer "click at CSS (x, y)" in resized pixels, rounded to multiples of STEP so that a point has few
    names.
    """
    return f"Action: click(start_box='({snap(x, size[0], RESIZED[0])},{snap(y, size[1], RESIZED[1])})')"


def snap(value: float, size: int, resized: int) -> int:
    """CSS pixel -> the nearest multiple of STEP in the resized image."""
    return min(max(STEP * round(value * resized / size / STEP), 0), resized)


def say(text: str) -> str:
    """The answer to a reading question."""
    return f"Action: finished(content='{text}')"


def think(name: str, answer: str) -> str:
    """`answer` with the thought before it that names what it acts on."""
    return f"Thought: {name}\n{answer}"


def random_string(rng: random.Random, low: int = 2, high: int = 8) -> str:
    """Letters and digits, mostly lower case, as the passwords of web forms are."""
    letters = string.ascii_letters + string.digits if rng.random() < 0.7 else string.ascii_lowercase
    return "".join(rng.choice(letters) for _ in range(rng.randint(low, high)))


def any_word(rng: random.Random) -> str:
    """A common word, now and then capitalised, or a random string."""
    roll = rng.random()
    if roll < 0.15:
        return random_string(rng)
    word = rng.choice(WORDS)
    return word.capitalize() if roll < 0.5 else word


@dataclass
class Page:
    """A picture under construction with the questions it answers; `taken` are the boxes in use."""

    rng: random.Random
    image: Image.Image
    asks: list[Ask] = field(default_factory=list)
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)
    labels: set[str] = field(default_factory=set)

    @property
    def draw(self) -> ImageDraw.ImageDraw:
        """A pen for the page."""
        return ImageDraw.Draw(self.image)

    def place(self, width: float, height: float, tries: int = 12) -> tuple[float, float] | None:
        """A free place for a box, or None; boxes keep 2 pixels apart."""
        for _ in range(tries):
            x = self.rng.uniform(1, max(WIDTH - width - 2, 1.5))
            y = self.rng.uniform(QUERY_HEIGHT + 1, max(HEIGHT - height - 2, QUERY_HEIGHT + 1.5))
            box = (x - 2, y - 2, x + width + 2, y + height + 2)
            if all(box[2] <= t[0] or box[0] >= t[2] or box[3] <= t[1] or box[1] >= t[3] for t in self.taken):
                self.taken.append(box)
                return round(x), round(y)
        return None

    def new_label(self, label: str) -> bool:
        """Whether nothing on the page is called `label` yet; from now on something is."""
        if label.lower() in self.labels:
            return False
        self.labels.add(label.lower())
        return True

    def ask(self, goal: str, answer: str, task: str) -> None:
        """Note one question about the page and its answer."""
        self.asks.append(Ask(goal, answer, task))

    def where(self, goals: tuple[str, ...], x: float, y: float, task: str) -> None:
        """Note a question that a click at (x, y) answers, in one of the wordings `goals`."""
        self.ask(self.rng.choice(goals), click(x, y), task)

    def what(self, label: str, x: float, y: float) -> None:
        """A reading question about the point (x, y)."""
        px, py = snap(x, WIDTH, RESIZED[0]), snap(y, HEIGHT, RESIZED[1])
        self.ask(f"Read ({px},{py})", say(label), "read")


def _button(page: Page, label: str | None = None, size: int | None = None) -> None:
    rng = page.rng
    label = label or rng.choice(("ONE", "TWO", "Submit", "OK", "Cancel", "Login", "Yes", "No", "Next", any_word(rng)))
    font = face(size or rng.choice((10, 11, 13, 13, 13, 14, 18)), "plain")
    text = font.getlength(label)
    width, height = text + rng.choice((8, 12, 30, 50)), font.size + rng.choice((5, 8, 14, 26))
    spot = page.place(width, height)
    if spot is None or not page.new_label(label):
        return
    x, y = spot
    fill = _GREY if rng.random() < 0.8 else rng.choice(tuple(COLORS.values()))
    page.draw.rounded_rectangle((x, y, x + width, y + height), 3, fill=fill, outline=_LINE)
    ink = "black" if sum(fill) > 300 else "white"
    page.draw.text((x + width / 2, y + height / 2), label, fill=ink, font=font, anchor="mm")
    goals = (f"Click button {label}.", f'Click on the "{label}" button.', f"Press {label}.")
    page.where(goals, x + width / 2, y + height / 2, "where")
    page.what(label, x + width / 2, y + height / 2)


def _word(page: Page) -> None:
    rng = page.rng
    label = (
        any_word(rng) if rng.random() < 0.7 else "".join(rng.choice(string.digits) for _ in range(rng.randint(1, 4)))
    )
    font = face(rng.choice((10, 10, 11, 12, 14, 16, 20, 26)), rng.choice(("plain", "plain", "bold")))
    width, height = font.getlength(label), font.size
    spot = page.place(width, height)
    if spot is None or not page.new_label(label):
        return
    x, y = spot
    link = rng.random() < 0.3
    page.draw.text(
        (x, y + height / 2),
        label,
        fill=(0, 0, 238) if link else rng.choice(("black", "black", (60, 60, 60))),
        font=font,
        anchor="lm",
    )
    if link:
        page.draw.line((x, y + height - 1, x + width, y + height - 1), fill=(0, 0, 238))
    goals = (f'Click on the link "{label}".', f'Click on the word "{label}".', f"Find {label}.")
    page.where(goals, x + width / 2, y + height / 2, "where")
    page.what(label, x + width / 2, y + height / 2)


def _fields(page: Page) -> None:
    rng = page.rng
    count = rng.randint(1, 3)
    y = float(QUERY_HEIGHT + rng.randint(2, 30))
    made: list[tuple[float, float]] = []
    for _ in range(count):
        x, width, height = rng.randint(2, 40), rng.choice((90, 104, 110)), rng.choice((17, 18, 21))
        if y + height > HEIGHT - 4:
            break
        page.taken.append((x - 2, y - 14, x + width + 2, y + height + 2))
        label = rng.choice(("Username", "Password", "Name", "Verify password", any_word(rng).capitalize()))
        named = rng.random() < 0.5 and page.new_label(label)
        focus = rng.random() < 0.3
        page.draw.rectangle(
            (x, y, x + width, y + height), fill="white", outline="black" if focus else _LINE, width=2 if focus else 1
        )
        middle = (x + width / 2, y + height / 2)
        if rng.random() < 0.4:
            text = any_word(rng)
            page.draw.text(
                (x + 3, middle[1]), text, fill="black", font=face(rng.choice((11, 13)), "plain"), anchor="lm"
            )
            page.what(text, *middle)
        if named:
            page.draw.text((x, y - 6), label, fill="black", font=face(10, rng.choice(("plain", "bold"))), anchor="lm")
            page.where((f"Click on the {label} field.", f"Focus into the {label} textbox."), *middle, "where-field")
        made.append(middle)
        y += height + rng.randint(6, 32)
    if len(made) == 1:
        page.where(("Focus into the textbox.", "Click on the text field."), *made[0], "where-field")
    for middle, ordinal in zip(made, ORDINALS, strict=False):
        page.where((f"Focus into the {ordinal} input textbox.",), *middle, "where-field")


def _ticks(page: Page) -> None:
    rng = page.rng
    kind = rng.choice(("checkbox", "radio"))
    y = float(QUERY_HEIGHT + rng.randint(2, 60))
    for _ in range(rng.randint(2, 6)):
        label, x = any_word(rng), rng.choice((4, 5, 6))
        if y > HEIGHT - 20 or not page.new_label(label):
            break
        page.taken.append((x - 2, y - 2, x + 90, y + 16))
        on = rng.random() < 0.3
        shape = page.draw.ellipse if kind == "radio" else page.draw.rectangle
        shape(
            (x, y, x + 12, y + 12), fill=_BLUE if on and kind == "checkbox" else "white", outline=_BLUE if on else _LINE
        )
        if on:
            page.draw.ellipse((x + 3, y + 3, x + 9, y + 9), fill=_BLUE if kind == "radio" else "white")
        page.draw.text((x + 18, y + 6), label, fill="black", font=face(10, "plain"), anchor="lm")
        page.where(
            (f"Select {label}.", f"Tick {label}.", f"Check {label} and click Submit."), x + 6, y + 6, "where-tick"
        )
        page.what(label, x + 18 + 3 * len(label), y + 6)
        y += rng.choice((14, 16, 18, 22))


def _boxes(page: Page) -> None:
    rng = page.rng
    side = rng.choice((16, 24, 34, 50))
    for name in rng.sample(tuple(COLORS), rng.randint(2, 4)):
        spot = page.place(side, side)
        if spot is None:
            return
        x, y = spot
        page.draw.rectangle((x, y, x + side, y + side), fill=COLORS[name], outline="black")
        goals = (f"Click on the {name} colored box.", f"Click on the {name} box.", f"Click {name}.")
        page.where(goals, x + side / 2, y + side / 2, "where-color")
        page.what(name, x + side / 2, y + side / 2)


def _shapes(page: Page) -> None:
    rng = page.rng
    for name in rng.sample(SHAPES, rng.randint(1, 3)):
        side = rng.choice((14, 20, 30, 44))
        color = rng.choice([c for c in COLORS if c != "white"])
        spot = page.place(side, side)
        if spot is None:
            return
        x, y = spot
        box, middle = (x, y, x + side, y + side), (x + side / 2, y + side / 2)
        if name == "circle":
            page.draw.ellipse(box, fill=COLORS[color])
        elif name == "triangle":
            page.draw.polygon([(x, y + side), (x + side, y + side), (x + side / 2, y)], fill=COLORS[color])
        elif name == "square":
            page.draw.rectangle(box, fill=COLORS[color])
        elif name == "cross":
            page.draw.rectangle((x + side / 3, y, x + 2 * side / 3, y + side), fill=COLORS[color])
            page.draw.rectangle((x, y + side / 3, x + side, y + 2 * side / 3), fill=COLORS[color])
        else:
            page.draw.rectangle((x, y + side / 4, x + side, y + 3 * side / 4), fill=COLORS[color])
        page.where((f"Click on the {name}.", f"Click on the {color} {name}."), *middle, "where-shape")
        page.what(rng.choice((f"{color} {name}", name)), *middle)


def _tabs(page: Page) -> None:
    rng = page.rng
    x, y = 4.0, QUERY_HEIGHT + rng.randint(3, 30)
    page.taken.append((0, y - 3, WIDTH, y + 22))
    page.draw.rectangle((2, y, WIDTH - 3, y + 20), fill=(233, 233, 233), outline=(221, 221, 221))
    active = rng.randint(1, 3)
    for number in range(1, 4):
        color = (0, 127, 255) if number == active else (246, 246, 246)
        page.draw.rectangle((x, y + 2, x + 42, y + 20), fill=color, outline=(197, 197, 197))
        page.draw.text(
            (x + 21, y + 11),
            f"Tab #{number}",
            fill="white" if number == active else (69, 69, 69),
            font=face(10, "plain"),
            anchor="mm",
        )
        page.where((f"Click on Tab #{number}.",), x + 21, y + 11, "where-tab")
        x += 44


def _close(page: Page) -> None:
    rng = page.rng
    width, height = rng.randint(80, 120), rng.randint(50, 90)
    spot = page.place(width, height)
    if spot is None:
        return
    x, y = spot
    page.draw.rounded_rectangle((x, y, x + width, y + height), 3, fill="white", outline=(170, 170, 170))
    page.draw.rectangle((x + 2, y + 2, x + width - 2, y + 17), fill=(233, 233, 233), outline=(200, 200, 200))
    cx, cy = x + width - 10, y + 10
    page.draw.rectangle((cx - 6, cy - 6, cx + 6, cy + 6), fill=(246, 246, 246), outline=(180, 180, 180))
    page.draw.line((cx - 3, cy - 3, cx + 3, cy + 3), fill=(90, 90, 90))
    page.draw.line((cx - 3, cy + 3, cx + 3, cy - 3), fill=(90, 90, 90))
    page.where(("Close the dialog box.", 'Close the dialog box by clicking the "x".'), cx, cy, "where-close")


def _copy(page: Page) -> None:
    """Copying does not need the picture; it shares the sequence because that is free."""
    rng = page.rng
    text = any_word(rng) if rng.random() < 0.5 else random_string(rng, 2, 6)
    goal = rng.choice(
        (
            'Type "{}".',
            'Enter "{}" into the text field.',
            'Write the word "{}" here.',
            'Type the name "{}" and press Enter.',
        )
    )
    page.ask(goal.format(text), f"Action: type(content='{text}')", "copy")


def _box(page: Page) -> None:
    """One coloured box of any size: the plainest question of place."""
    rng = page.rng
    name, width, height = rng.choice(tuple(COLORS)), rng.randint(8, 80), rng.randint(8, 80)
    spot = page.place(width, height)
    if spot is None:
        return
    x, y = spot
    page.draw.rectangle((x, y, x + width, y + height), fill=COLORS[name], outline="black")
    middle = (x + width / 2, y + height / 2)
    for goal in (f"Click on the {name} box.", f"Click {name}.", "Click on the box."):
        page.ask(goal, click(*middle), "where-alone")
    page.what(name, *middle)


_SINGLE = (_box, _box, _button, _word, _fields, _close)
# Few of the pages ask for words of any kind: reading them is slow to learn, and the tasks name little but fixed labels.
_MAKERS = (_button, _button, _button, _word, _fields, _ticks, _boxes, _boxes, _shapes, _shapes, _tabs, _close)


def drawn_turn(rng: random.Random, asks: int = 8) -> Turn:
    """One drawn page with about `asks` questions: image uint8 [210, 160, 3]."""
    page = Page(rng, Image.new("RGB", (WIDTH, HEIGHT), "white"))
    page.draw.rectangle((0, 0, WIDTH, QUERY_HEIGHT), fill=(255, 255, 0))
    # Some pages hold a single thing: places are learned there first, telling things apart comes after.
    alone = rng.random() < 0.3
    fixed = rng.sample((_fields, _ticks, _tabs), 1) if not alone and rng.random() < 0.5 else []
    for maker in fixed + [rng.choice(_SINGLE if alone else _MAKERS) for _ in range(1 if alone else rng.randint(2, 7))]:
        if maker in (_fields, _ticks, _tabs) and page.taken:
            continue
        maker(page)
    chosen = rng.sample(page.asks, min(asks - COPIES, len(page.asks)))
    page.asks = []
    for _ in range(COPIES):
        _copy(page)
    chosen += page.asks
    _query(page, chosen[0].goal)
    return Turn(np.asarray(page.image), chosen)


def _query(page: Page, text: str) -> None:
    font, x, y = face(10, "plain"), 3.0, 3.0
    for word in text.split(" "):
        length = font.getlength(word + " ")
        if x + length > WIDTH - 3:
            x, y = 3.0, y + 12
        page.draw.text((x, y), word, fill="black", font=font)
        x += length
