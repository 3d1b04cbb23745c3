"""Where a row ends before its last slot: at an end of text, or at a stop string. What lies behind is filled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from dlm.canvas import Canvas


def end_rows(canvas: Canvas, ends: torch.Tensor, early: bool) -> torch.Tensor:
    """Fills what lies behind a row's first end of text with that token: bool [batch, L], slots that changed.

    An end inside a gap, with given text behind it, ends nothing.

    Args:
        ends: int64 [k], the tokens that end a text.
        early: at once; False = only when no mask is left before the end.
    """
    slots = torch.arange(canvas.length, device=canvas.ids.device)[None]
    is_end = torch.isin(canvas.ids, ends) & (slots >= canvas.tail[:, None])
    # argmax gives the first of equal values; a row without an end gives 0, which `ended` masks below.
    first = is_end.int().argmax(1, keepdim=True)
    ended = is_end.any(1)
    if not early:
        ended = ended & ~(canvas.masked() & ~canvas.given & (slots < first)).any(1)
    return canvas.finish_row(first[:, 0].masked_fill(~ended, canvas.length), canvas.ids.gather(1, first)[:, 0])


class StopStrings:
    """Ends rows whose text holds one of some strings, wherever blocks and tokens are cut.

    Args:
        strings: what ends a text.
        tokenizer: of the model.
        fill: the token that stands behind a text that ended.

    Raises:
        ValueError: no tokenizer, or an empty string.
    """

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase | None, fill: int | None) -> None:
        if tokenizer is None:
            raise ValueError(f"stop={list(strings)!r} is text; give decode() the model's tokenizer too")
        if fill is None:
            raise ValueError("stop strings fill what lies behind them with an end of text, and this model has none")
        self.strings, self.tokenizer, self.fill = tuple(strings), tokenizer, fill

    def end_rows(self, canvas: Canvas) -> torch.Tensor:
        """Fills what lies behind the token that completes a row's first stop string: bool [batch, L], what changed."""
        after = torch.full_like(canvas.tail, canvas.length)
        for row, (ids, tail) in enumerate(zip(canvas.ids.tolist(), canvas.tail.tolist(), strict=True)):
            # Only text that touches what was given: between it and later islands something is still to be written.
            stop = next((i for i in range(tail, canvas.length) if ids[i] == canvas.mask_id), canvas.length)
            if (count := self.tokens_to_stop(ids[tail:stop])) is not None:
                after[row] = tail + count - 1
        return canvas.finish_row(after, torch.full_like(after, self.fill))

    def tokens_to_stop(self, ids: list[int]) -> int | None:
        """How many tokens the text has that ends with the first stop string; None = there is none."""
        if self.cut(self.tokenizer.decode(ids, skip_special_tokens=True)) is None:
            return None
        low, high = 1, len(ids)
        # The text of more tokens only grows, so the shortest that holds a stop string is found by halving.
        while low < high:
            middle = (low + high) // 2
            found = self.cut(self.tokenizer.decode(ids[:middle], skip_special_tokens=True)) is not None
            low, high = (low, middle) if found else (middle + 1, high)
        return low

    def cut(self, text: str) -> str | None:
        """The text before its first stop string; None = it holds none."""
        return cut_at(text, self.strings)


def cut_at(text: str, strings: Sequence[str]) -> str | None:
    """The text before the first of `strings` in it; None = it holds none."""
    places = [place for one in strings if (place := text.find(one)) >= 0]
    return text[: min(places)] if places else None
