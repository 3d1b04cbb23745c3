"""A question that the browser asks, not the page: drawn over the picture, answered by mouse or keys as a person does.

Dialogs (alert, confirm, prompt) and the choice of a file are windows of the browser or the system; a page's own
picture has none of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from . import fonts
from .actions import Action, Click, DoubleClick, Hotkey, Type, parts

_SIZE = 13  # CSS pixels of a letter
_LINE = 18
_EDGE = 10
_WIDEST = 420
_MOST_LINES = 12
_SHADE, _FIELD, _BUTTON, _MARK = (118, 118, 118), (240, 240, 240), (26, 115, 232), (11, 67, 150)

Box = tuple[float, float, float, float]


@dataclass
class Sheet:
    """`text` with buttons; the first means yes, the last no. `choices` are rows to choose one of; `typed` is the text
    of its field, None without one. A text that stands there from the start is marked: what is typed replaces it.
    """

    text: str
    buttons: tuple[str, ...]
    choices: tuple[str, ...] = ()
    typed: str | None = None
    reply: str = ""  # the button or row that was chosen; "" while it is open
    _boxes: dict[str, Box] = field(default_factory=dict)
    _marked: bool = field(init=False)
    _at: int | None = None  # the button that Tab has come to, None for the field, or for none

    def __post_init__(self) -> None:
        self._marked = bool(self.typed)

    def act(self, action: Action) -> str:
        """Let `action` answer; returns "" or why it could not."""
        for part in parts(action):
            if not self.reply and not self._take(part):
                return f"{type(part).__name__} did nothing: the browser asks first: {self.text}"
        return ""

    def _take(self, action: Action) -> bool:
        match action:
            case Click(x, y) | DoubleClick(x, y):
                self._press(x, y)
            case Hotkey(("Enter",)):
                self.reply = self.buttons[self._at or 0]
            case Hotkey(("Space",)) if self.typed is None or self._at is not None:
                self.reply = self.buttons[self._at or 0]
            case Hotkey(("Escape",)):
                self.reply = self.buttons[-1]
            case Hotkey(("Tab",)):
                self._step()
            case _ if self.typed is not None and self._at is None:
                return self._write(action, self.typed)
            case _:
                return False
        return True

    def _step(self) -> None:
        """Tab goes on: from the field to the buttons and back; without a field the first button has the focus."""
        at = 0 if self._at is None and self.typed is None else -1 if self._at is None else self._at
        around = self.typed is not None and at + 1 == len(self.buttons)
        self._at = None if around else (at + 1) % len(self.buttons)

    def _write(self, action: Action, typed: str) -> bool:
        match action:
            case Hotkey(("Control", "a" | "A")):
                self._marked = bool(typed)
                return True
            case Hotkey(("Backspace",)) | Hotkey(("Delete",)):
                self.typed = "" if self._marked else typed[:-1] if action == Hotkey(("Backspace",)) else typed
            case Hotkey(("End",)) | Hotkey(("ArrowRight",)):
                pass  # the mark goes away, and writing goes on behind the text
            case Type(text):
                self.typed = ("" if self._marked else typed) + text.rstrip("\n")
                self.reply = self.buttons[0] if text.endswith("\n") else ""
            case _:
                return False
        self._marked = False
        return True

    def _press(self, x: float | None, y: float | None) -> None:
        if x is None or y is None:
            return
        for name, (left, top, right, bottom) in self._boxes.items():
            if left <= x < right and top <= y < bottom:
                self.reply = name

    def draw(self, picture: np.ndarray, scale: float) -> np.ndarray:
        """`picture` uint8 [height, width, 3] of `scale` device pixels per CSS pixel with the sheet on top of it."""
        image = Image.fromarray(picture)
        pen = ImageDraw.Draw(image)
        letters = ImageFont.truetype(str(fonts.face("sans")), round(_SIZE * scale))
        wide = min(_WIDEST, image.width / scale - 4)
        lines = _wrap(self.text, lambda text: letters.getlength(text) <= (wide - 2 * _EDGE) * scale)
        rows = len(lines) + len(self.choices) * 1.4 + (1.6 if self.typed is not None else 0) + 2
        high = rows * _LINE + 2 * _EDGE
        left, top = (image.width / scale - wide) / 2, max(2.0, (image.height / scale - high) / 4)
        self._boxes.clear()

        def box(place: Box, fill: tuple[int, int, int], text: str, ink: str) -> None:
            pen.rectangle([value * scale for value in place], fill=fill, outline=_SHADE)
            pen.text(((place[0] + 6) * scale, (place[1] + 3) * scale), text, font=letters, fill=ink)

        box((left, top, left + wide, top + high), (255, 255, 255), "", "black")
        y = top + _EDGE
        for line in lines:
            pen.text(((left + _EDGE) * scale, y * scale), line, font=letters, fill="black")
            y += _LINE
        if self.typed is not None:
            colours = (_MARK, "white") if self._marked else ((255, 255, 255), "black")
            box((left + _EDGE, y, left + wide - _EDGE, y + 1.3 * _LINE), colours[0], self.typed, colours[1])
            y += 1.6 * _LINE
        for choice in self.choices:
            self._boxes[choice] = (left + _EDGE, y, left + wide - _EDGE, y + 1.3 * _LINE)
            box(self._boxes[choice], _FIELD, choice, "black")
            y += 1.4 * _LINE
        right = left + wide - _EDGE
        for number, name in reversed(list(enumerate(self.buttons))):
            width = letters.getlength(name) / scale + 24
            self._boxes[name] = (right - width, y + 6, right, y + 6 + 1.4 * _LINE)
            box(self._boxes[name], _MARK if number == self._at else _BUTTON, name, "white")
            right -= width + 8
        return np.array(image)


def _wrap(text: str, fits) -> list[str]:
    lines = [""]
    for paragraph in text.splitlines() or [""]:
        for word in paragraph.split():
            longer = f"{lines[-1]} {word}".strip()
            if fits(longer) or not lines[-1]:
                lines[-1] = longer
            else:
                lines.append(word)
        lines.append("")
    return lines[:-1][:_MOST_LINES]
