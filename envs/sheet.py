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
_SHADE, _FIELD, _BUTTON = (118, 118, 118), (240, 240, 240), (26, 115, 232)

Box = tuple[float, float, float, float]


@dataclass
class Sheet:
    """`text` with buttons; the first means yes, the last no. `choices` are rows to choose one of; `typed` is the text
    of its field, None without one.
    """

    text: str
    buttons: tuple[str, ...]
    choices: tuple[str, ...] = ()
    typed: str | None = None
    reply: str = ""  # the button or row that was chosen; "" while it is open
    _boxes: dict[str, Box] = field(default_factory=dict)

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
                self.reply = self.buttons[0]
            case Hotkey(("Space",)) if self.typed is None:
                self.reply = self.buttons[0]
            case Hotkey(("Escape",)):
                self.reply = self.buttons[-1]
            case Hotkey(("Control", "a")) if self.typed is not None:
                self.typed = ""
            case Hotkey(("Backspace",)) if self.typed is not None:
                self.typed = self.typed[:-1]
            case Type(text) if self.typed is not None:
                self.typed += text.rstrip("\n")
                if text.endswith("\n"):
                    self.reply = self.buttons[0]
            case _:
                return False
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
            box((left + _EDGE, y, left + wide - _EDGE, y + 1.3 * _LINE), (255, 255, 255), self.typed, "black")
            y += 1.6 * _LINE
        for choice in self.choices:
            self._boxes[choice] = (left + _EDGE, y, left + wide - _EDGE, y + 1.3 * _LINE)
            box(self._boxes[choice], _FIELD, choice, "black")
            y += 1.4 * _LINE
        right = left + wide - _EDGE
        for name in reversed(self.buttons):
            width = letters.getlength(name) / scale + 24
            self._boxes[name] = (right - width, y + 6, right, y + 6 + 1.4 * _LINE)
            box(self._boxes[name], _BUTTON, name, "white")
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
