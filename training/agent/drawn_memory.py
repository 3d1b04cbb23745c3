"""Drawn episodes in the manner of the memory pages: something is shown, then hidden, then asked for.

Reading real pages one browser step at a time is slow; these replicas of their layouts cost a few milliseconds. Next
to the action that solves the page they ask direct questions about this and earlier screenshots.
"""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageDraw

from training.agent.drawn import HEIGHT, WIDTH, click, face, say, snap, think
from training.agent.packing import Ask, Look, Turn
from training.agent.shape import CELLS, RESIZED

_SCALE = 2
_COLOURS = {
    "red": "#e00000",
    "blue": "#0050ff",
    "green": "#00a000",
    "yellow": "#ffd800",
    "purple": "#9000c0",
    "orange": "#ff8000",
    "cyan": "#00c8e0",
    "black": "#000000",
}
_SHAPES = ("circle", "square", "triangle", "cross")
_CROSS = (34, 4, 66, 4, 66, 34, 96, 34, 96, 66, 66, 66, 66, 96, 34, 96, 34, 66, 4, 66, 4, 34, 34, 34)
_INK = "#333333"
_NEXT = (10, 160, 140, 44)
_CARD = (35, 30, 90, 90)
_RECALL = ((6, 10, 70, 70), (84, 10, 70, 70), (45, 120, 70, 70))
Box = tuple[float, float, float, float]


def _middle(box: Box) -> str:
    return click(box[0] + box[2] / 2, box[1] + box[3] / 2)


def _look(screen: int, box: Box) -> Look:
    """The visual token in the middle of `box`."""
    x, y = box[0] + box[2] / 2, box[1] + box[3] / 2
    return Look(screen, int(x * CELLS[0] / WIDTH), int(y * CELLS[1] / HEIGHT))


class Screen:
    """One screen under construction, drawn at twice its size and reduced at the end; boxes are (x, y, width,
    height).
    """

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH * _SCALE, HEIGHT * _SCALE), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.asks: list[Ask] = []

    def _corners(self, box: Box) -> tuple[float, float, float, float]:
        x, y, w, h = (_SCALE * v for v in box)
        return x, y, x + w - 1, y + h - 1

    def ask(self, goal: str, answer: str, task: str) -> None:
        """Note one question about the screen and its answer."""
        self.asks.append(Ask(goal, answer, task))

    def recall(self, goal: str, words: str, *looks: Look) -> None:
        """Ask for `words` that an earlier screen showed at `looks`."""
        self.asks.append(Ask(goal, say(words), "memory-recall", looks))

    def text(self, text: str, box: Box, size: int, ink: str = "black") -> None:
        """Write `text` in the middle of `box`, `size` px high."""
        place = (_SCALE * (box[0] + box[2] / 2), _SCALE * (box[1] + box[3] / 2))
        self.draw.text(place, text, fill=ink, font=face(_SCALE * size, "bold"), anchor="mm")

    def button(
        self, text: str, box: Box, size: int, fill: str = "#e4e4e4", edge: str = _INK, ink: str = "black"
    ) -> None:
        """Draw a button; one with a text may be asked for."""
        self.draw.rounded_rectangle(self._corners(box), 6 * _SCALE, fill=fill, outline=edge, width=2 * _SCALE)
        self.text(text, box, size, ink)
        if text:
            self.ask(f"Click on {text}.", _middle(box), "memory-where")

    def next(self) -> None:
        """Draw the button that leads to the next page."""
        self.button("Next", _NEXT, 26, "#1a3f8b", "#1a3f8b", "white")

    def card(self, text: str, box: Box, size: int) -> None:
        """Draw a card as those whose text has to be remembered, and ask to read it."""
        self.draw.rectangle(self._corners(box), fill="#fff3b8", outline=_INK, width=2 * _SCALE)
        self.text(text, box, size)
        if text:
            x, y = snap(box[0] + box[2] / 2, WIDTH, RESIZED[0]), snap(box[1] + box[3] / 2, HEIGHT, RESIZED[1])
            self.ask(f"Read ({x},{y})", say(text), "memory-read")

    def swatch(self, colour: str, box: Box, pressed: bool) -> None:
        """Draw a field of one colour, as a button or flat, and ask for it."""
        if pressed:
            self.button("", box, 10, _COLOURS[colour])
        else:
            self.draw.rectangle(self._corners(box), fill=_COLOURS[colour])
        self.ask(f"Click on {colour}.", _middle(box), "memory-where")

    def figure(self, item: tuple[str, str], box: Box, faded: bool = False) -> None:
        """Draw the (colour, shape) `item`; `faded` = clicked already."""
        colour, shape = item
        side, (x, y) = _SCALE * box[2] / 100, (_SCALE * box[0], _SCALE * box[1])
        fill = _COLOURS[colour]
        if faded:
            fill = tuple(round(0.25 * int(fill[i : i + 2], 16) + 0.75 * 255) for i in (1, 3, 5))
        points = {
            "square": (8, 8, 92, 8, 92, 92, 8, 92),
            "triangle": (50, 4, 98, 94, 2, 94),
            "cross": _CROSS,
        }.get(shape)
        if points is None:
            self.draw.ellipse((x + 4 * side, y + 4 * side, x + 96 * side, y + 96 * side), fill=fill)
        else:
            self.draw.polygon(
                [(x + a * side, y + b * side) for a, b in zip(points[::2], points[1::2], strict=True)], fill=fill
            )
        self.ask(f"Click on the {colour} {shape}.", _middle(box), "memory-where")

    def pixels(self) -> np.ndarray:
        """The screen as uint8 [height, width, 3], at its real size."""
        return np.asarray(self.image.reduce(_SCALE))


class Episode:
    """A list of finished screens with the goal's action at each."""

    def __init__(self, goal: str, task: str, rng: random.Random) -> None:
        self.goal, self.task, self.rng = goal, task, rng
        self.turns: list[Turn] = []
        self.screens: list[Screen] = []

    def add(self, screen: Screen, name: str, action: str, *looks: Look) -> None:
        """Finish `screen`: there the goal wants `action` on what is called `name`; with `looks`, an earlier screen
        showed at these places what to do. Questions of recall are rare and dear, so all of them are asked.
        """
        recall = [ask for ask in screen.asks if ask.task == "memory-recall"]
        here = [ask for ask in screen.asks if ask.task != "memory-recall"]
        here = self.rng.sample(here, min(1 if recall else 2, len(here)))
        answer, task = think(name, action), self.task if looks else "drawn-next"
        asks = [Ask(self.goal, answer, task, looks), *recall, *here]
        self.turns.append(Turn(screen.pixels(), asks, answer, self.goal))
        self.screens.append(screen)

    def next(self, screen: Screen) -> None:
        """Finish `screen` with its button "Next"."""
        screen.next()
        self.add(screen, "Next", _middle(_NEXT))


def _hops(rng: random.Random) -> int:
    """Screens in between that have nothing to do with the goal."""
    return rng.choice((0, 0, 1, 1, 1, 1, 2, 4))


def _items(rng: random.Random) -> list[tuple[str, str]]:
    return list(zip(rng.sample(tuple(_COLOURS), 3), rng.sample(_SHAPES, 3), strict=True))


def _figure_screen(rng: random.Random) -> Screen:
    screen = Screen()
    item = (rng.choice(tuple(_COLOURS)), rng.choice(_SHAPES))
    screen.figure(item, _CARD)
    screen.ask("Which figure?", say(" ".join(item)), "memory-read")
    return screen


def code(rng: random.Random) -> Episode:
    """Two or three digits, unrelated figures, then a keypad or a text field."""
    digits = [rng.choice("0123456789") for _ in range(rng.choice((2, 2, 3)))]
    typed = len(digits) == 2 and rng.random() < 0.3
    end = "type it and press OK." if typed else "enter it on the keypad."
    episode = Episode(f"Remember the code, then {end}", "drawn-code-typed" if typed else "drawn-code", rng)
    width = 46 if len(digits) > 2 else 62
    left = (160 - len(digits) * width - (len(digits) - 1) * 6) / 2
    slots = [left + i * (width + 6) for i in range(len(digits))]
    screen, looks = Screen(), []
    for digit, x in zip(digits, slots, strict=True):
        screen.card(digit, (x, 30, width, 92), 68 if len(digits) > 2 else 76)
        looks.append(_look(0, (x, 30, width, 92)))
    screen.ask("What is the code?", say("".join(digits)), "memory-read")
    episode.next(screen)
    for _ in range(_hops(rng)):
        screen = _figure_screen(rng)
        screen.recall("What was the code?", "".join(digits), *looks)
        episode.next(screen)
    if typed:
        _typed(episode, "".join(digits), looks)
    else:
        _keypad(episode, digits, looks, slots, width)
    return episode


def _keypad(episode: Episode, digits: list[str], looks: list[Look], slots: list[float], width: float) -> None:
    keys = {key: (3 + i % 3 * 52, 49 + i // 3 * 40, 50, 38) for i, key in enumerate("123456789 0") if key != " "}
    for pressed, (digit, look) in enumerate(zip(digits, looks, strict=True)):
        screen = Screen()
        for i, x in enumerate(slots):
            screen.card(digits[i] if i < pressed else "", (x, 4, width, 40), 32)
        for key, box in keys.items():
            screen.button(key, box, 28)
        if not pressed:
            screen.recall("What was the code?", "".join(digits), *looks)
        episode.add(screen, digit, _middle(keys[digit]), look)


def _typed(episode: Episode, digits: str, looks: list[Look]) -> None:
    field, button = (15, 40, 130, 60), (30, 125, 100, 56)
    for step in range(3):
        screen = Screen()
        edge, fill = (_INK, "#ffffff") if step == 0 else ("#0050ff", "#eaf2ff")
        screen.draw.rectangle(screen._corners(field), fill=fill, outline=edge, width=3 * _SCALE)
        if step == 2:
            screen.text(digits, field, 40)
        else:
            screen.recall("What was the code?", digits, *looks)
        screen.button("OK", button, 30)
        if step == 1:
            episode.add(screen, digits, f"Action: type(content='{digits}')", *looks)
        else:
            episode.add(screen, "OK" if step else "field", _middle(button if step else field))


def colour(rng: random.Random) -> Episode:
    """One colour, unrelated digits, then four colours to choose from."""
    four = rng.sample(tuple(_COLOURS), 4)
    wanted, shown = rng.choice(four), (25, 20, 110, 110)
    episode = Episode("Remember the colour, then click it.", "drawn-colour", rng)
    screen, look = Screen(), _look(0, shown)
    screen.swatch(wanted, shown, False)
    screen.ask("Which colour?", say(wanted), "memory-read")
    episode.next(screen)
    for _ in range(_hops(rng)):
        screen, digit = Screen(), rng.choice("0123456789")
        screen.card(digit, (45, 30, 70, 92), 76)
        screen.ask("Which digit?", say(digit), "memory-read")
        screen.recall("Which colour was it?", wanted, look)
        episode.next(screen)
    screen = Screen()
    boxes = {name: (6 + i % 2 * 76, 20 + i // 2 * 88, 72, 82) for i, name in enumerate(four)}
    for name, box in boxes.items():
        screen.swatch(name, box, True)
    screen.recall("Which colour was it?", wanted, look)
    episode.add(screen, wanted, _middle(boxes[wanted]), look)
    return episode


def place(rng: random.Random) -> Episode:
    """A dot in one of nine fields, an unrelated figure, then the fields without it; fields are called 1 to 9."""
    wanted, ink = rng.randrange(9), rng.choice(tuple(_COLOURS))
    boxes = [(4 + i % 3 * 52, 4 + i // 3 * 52, 48, 48) for i in range(9)]
    name, look = str(wanted + 1), _look(0, boxes[wanted])
    episode = Episode("Remember where the dot is, then click that field.", "drawn-place", rng)
    for step in range(hops := _hops(rng) + 2):
        if 0 < step < hops - 1:
            screen = _figure_screen(rng)
            screen.recall("Which field had the dot?", name, look)
            episode.next(screen)
            continue
        screen = Screen()
        for number, box in enumerate(boxes):
            screen.button("", box, 10)
            screen.ask(f"Click on field {number + 1}.", _middle(box), "memory-where")
        if step == 0:
            left, top = boxes[wanted][:2]
            screen.figure((ink, "circle"), (left + 8, top + 8, 32, 32))
            screen.asks = [Ask("Which field has the dot?", say(name), "memory-read", (look,)), *screen.asks]
            episode.next(screen)
        else:
            screen.recall("Which field had the dot?", name, look)
            episode.add(screen, name, _middle(boxes[wanted]), look)
    return episode


def order(rng: random.Random) -> Episode:
    """Three figures on three screens, then all of them: click the first, or all in their order."""
    items, first = _items(rng), rng.random() < 0.4
    end = "the one that was shown first." if first else "them in the order they were shown."
    episode = Episode(f"Remember the shapes, then click {end}", "drawn-first" if first else "drawn-order", rng)
    for item in items:
        screen = Screen()
        screen.figure(item, _CARD)
        screen.ask("Which figure?", say(" ".join(item)), "memory-read")
        episode.next(screen)
    places = dict(zip(rng.sample(items, 3), _RECALL, strict=True))
    for chosen in range(1 if first else 3):
        screen = Screen()
        for item, box in places.items():
            screen.figure(item, box, faded=items.index(item) < chosen)
        for number, (ordinal, item) in enumerate(zip(("first", "second", "third"), items, strict=True)):
            if not chosen:
                screen.recall(f"Which was {ordinal}?", " ".join(item), *[_look(number, _CARD)] * 2)
        item = items[chosen]
        episode.add(screen, " ".join(item), _middle(places[item]), *[_look(chosen, _CARD)] * 2)
    return episode


def changed(rng: random.Random) -> Episode:
    """Three figures; on the next screen one has another colour or another form."""
    shapes, colours = rng.sample(_SHAPES, 4), rng.sample(tuple(_COLOURS), 4)
    before = list(zip(colours, shapes, strict=True))[:3]
    which, after = rng.randrange(3), list(before)
    after[which] = (colours[3], before[which][1]) if rng.random() < 0.5 else (before[which][0], shapes[3])
    episode = Episode("Remember the shapes, then click the one that changed.", "drawn-changed", rng)
    boxes = [(4 + i * 52, 55, 48, 48) for i in range(3)]
    for number, items in enumerate((before, after)):
        screen = Screen()
        for ordinal, item, old, box in zip(("first", "second", "third"), items, before, boxes, strict=True):
            screen.figure(item, box)
            looks = [_look(0, box)] * 2
            screen.ask(f"Which figure is {ordinal}?", say(" ".join(item)), "memory-read")
            if number:
                screen.recall(f"Which figure was {ordinal}?", " ".join(old), *looks)
        if number:
            episode.add(screen, " ".join(after[which]), _middle(boxes[which]), *[_look(1, boxes[which])] * 2)
        else:
            episode.next(screen)
    return episode


_KINDS = (code, code, colour, order, changed, place)


def drawn_episode(rng: random.Random) -> list[Turn]:
    """One drawn memory episode of a random kind."""
    turns = rng.choice(_KINDS)(rng).turns
    turns[-1].reply = None
    return turns


def drawn_screen(rng: random.Random, asks: int = 6) -> list[Turn]:
    """One screen of such an episode alone, with questions about what is on it: cheaper than the whole."""
    here: list[Ask] = []
    while not here:
        episode = rng.choice(_KINDS)(rng)
        number = rng.randrange(len(episode.screens))
        here = [ask for ask in episode.screens[number].asks if ask.task != "memory-recall"]
    return [Turn(episode.turns[number].image, rng.sample(here, min(asks, len(here))))]
