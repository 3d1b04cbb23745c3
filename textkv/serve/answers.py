"""The text of an answer while its tokens arrive: whole characters only, and nothing that may become a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what a decoder writes for a character of which bytes are missing
LONGEST_CHARACTER = 4  # bytes of UTF-8


class Answer:
    """An answer that grows token by token.

    Args:
        decode: token ids to text, without the tokens that end a turn.
        stop: strings that end the answer; they are not part of it.

    Attributes:
        ids: the tokens so far.
        stopped: whether a stop string was found.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self.ids: list[int] = []
        self.stopped = False
        self._decode, self._stop, self._given = decode, tuple(stop), 0

    def add(self, token: int) -> str:
        """Takes a token; gives the text that has become final, often none."""
        if self.stopped:
            return ""
        self.ids.append(token)
        text = self._decode(self.ids)
        # A character of several tokens comes when it is whole; a decoder's own sign for damage stays if nothing helps.
        open_end = len(text) - len(text.rstrip(UNFINISHED))
        text = text[: len(text) - open_end] if open_end < LONGEST_CHARACTER else text
        # What may begin a stop string was held back, so none begins in what was given.
        found = [at for at in (text.find(word, self._given) for word in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._give(text[: min(found)])
        return self._give(text[: len(text) - self._may_become_stop(text)])

    def end(self) -> str:
        """The rest, when no token follows."""
        return "" if self.stopped else self._give(self._decode(self.ids))

    def _give(self, text: str) -> str:
        new, self._given = text[self._given :], max(self._given, len(text))
        return new

    def _may_become_stop(self, text: str) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = 0
        for word in self._stop:
            for n in range(min(len(word) - 1, len(text)), longest, -1):
                if text.endswith(word[:n]):
                    longest = n
                    break
        return longest
