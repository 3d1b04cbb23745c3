"""Draws a canvas while its masks become text: frozen blocks, the active block and masks in different colours.

In a terminal the picture is redrawn in place; elsewhere every forward is a line of plain text, masks as `_`.
"""

from __future__ import annotations

from itertools import groupby
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dlm.canvas import Canvas
from dlm.decode import Stats

STYLES = {
    "prompt": "dim",
    "frozen": "green",
    "active": "bold black on yellow",
    "ahead": "cyan",
    "end": "dim",
    "mask": "bright_black",
    "active mask": "yellow",
}
SIGNS = {"mask": "░", "active mask": "▒", "end": "·"}
PLAIN = {"mask": "_", "active mask": "_", "end": ""}
PROMPT_SHOWN = 160  # characters of the prompt's end
FRAMES = 12  # pictures per second


class Painter:
    """A context whose instance is `on_step` of a decode of one row.

    Args:
        tokenizer: of the model.
        prompt: what the row goes on from, as text.
        console: where to draw.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: str, console: Console) -> None:
        self.tokenizer, self.console = tokenizer, console
        self.prompt = prompt if len(prompt) <= PROMPT_SHOWN else "…" + prompt[-PROMPT_SHOWN:]
        self.pieces: list[tuple[str, str]] = []
        self.line = ""
        self.live = Live(get_renderable=self.picture, console=console, refresh_per_second=FRAMES, transient=True)

    def __enter__(self) -> Painter:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def __call__(self, canvas: Canvas, stats: Stats) -> None:
        written = canvas.length - canvas.prompt - int(canvas.left_cpu[0])
        self.line = f"forward {stats.forwards}, {written} of {canvas.length - canvas.prompt} tokens"
        self.pieces = pieces(canvas, self.tokenizer)
        if not self.console.is_terminal:
            text = "".join(PLAIN[name] * len(x) if name in PLAIN else x for name, x in self.pieces)
            self.console.print(f"{self.line}: {' '.join(text.split())}", markup=False, highlight=False, soft_wrap=True)

    def picture(self) -> Text:
        """The canvas as it is now; where the terminal is too small its beginning is left out."""
        text = Text.assemble((self.prompt, STYLES["prompt"]), *((piece, STYLES[name]) for name, piece in self.pieces))
        # Four lines are left for the progress line and for what the terminal wraps.
        room = self.console.width * max(1, self.console.height - 4)
        if len(text) > room:
            text = text[len(text) - room :]
        return Text.assemble(text, "\n", (self.line, "dim"))


def pieces(canvas: Canvas, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """The generated part of row 0 as (kind of piece, text), a sign for every mask and every special token.

    Kinds: "frozen" and "ahead", text before and behind the active block; "active", text in it; "end", what ends and
    fills a text; "mask" and "active mask".
    """
    ids = canvas.ids[0, canvas.prompt :].tolist()
    # The prompt's last token: whether the answer's first word has a blank in front depends on it.
    before = canvas.ids[0, canvas.prompt - 1 : canvas.prompt].tolist() if canvas.prompt else []
    block, special = int(canvas.active_cpu[0]), set(tokenizer.all_special_ids)

    def kind(slot: int) -> str:
        own = (slot + canvas.prompt - canvas.begin) // canvas.block_length
        if ids[slot] == canvas.mask_id:
            return "active mask" if own == block else "mask"
        if ids[slot] in special:
            return "end"
        return "active" if own == block else "frozen" if own < block else "ahead"

    found = []
    for name, slots in groupby(range(len(ids)), kind):
        run = list(slots)
        if name in SIGNS:
            found.append((name, SIGNS[name] * len(run)))
            continue
        # Decoded behind its neighbour, so that a blank between the two is not lost.
        anchor = ids[run[0] - 1 : run[0]] if run[0] else before
        lead = tokenizer.decode(anchor, skip_special_tokens=False)
        whole = tokenizer.decode(anchor + [ids[slot] for slot in run], skip_special_tokens=False)
        found.append((name, whole[len(lead) :] if whole.startswith(lead) else whole))
    return found
