"""The text of an answer while its tokens arrive: whole characters only, and nothing that may become a stop string.

Each token is decoded in the company of the few before it, so that an answer costs what it is long. A tokenizer writes a
token by its neighbours (a space in front of a word, none at the beginning of a text; a character of several tokens), so
what is new is what the same window says more than it did before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

UNFINISHED = "\ufffd"  # what a decoder writes for a character of which bytes are missing
OPEN = 64
"""So many of these may still become characters: decoders of single bytes write one for each byte, of whole characters
just before an unfinished one as well. More are damage, and stay."""


class Answer:
    """An answer that grows token by token. All that it gives, put together, is the whole answer decoded at once; only
    where bytes are no characters, that may write more of them as damaged.

    Args:
        decode: token ids to text.
        stop: strings that end the answer; they are not part of it.
        silent: tokens that are no text, as those that end a turn.
        strip: without blanks at both ends.

    Attributes:
        stopped: whether a stop string was found.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str] = (),
        silent: Collection[int] = (),
        strip: bool = False,
    ) -> None:
        self.stopped = False
        self._decode, self._stop, self._silent, self._strip = decode, tuple(stop), silent, strip
        self._window: list[int] = []  # the last tokens, from a place where a character begins
        self._told, self._read = 0, 0  # so many characters of its text are known, and so many tokens were whole
        self._held, self._begun = "", False  # what is known and not given yet

    def add(self, token: int) -> str:
        """Takes a token; gives the text that has become final, often none."""
        if self.stopped or token in self._silent:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        open_end = len(text) - len(text.rstrip(UNFINISHED))
        open_end = 0 if open_end > OPEN else open_end
        self._take(text[: len(text) - open_end])
        if not open_end:
            self._move(len(text))
        stopped = self._stopped()
        if self.stopped:
            return stopped
        end = len(self._held) - self._may_become_stop()
        return self._give(len(self._held[:end].rstrip()) if self._strip else end, last=False)

    def end(self) -> str:
        """The rest, when no token follows."""
        if self.stopped:
            return ""
        self._take(self._decode(self._window))
        before = self._stopped()
        return before if self.stopped else self._give(len(self._held))

    def _take(self, text: str) -> None:
        """The window's text, as far as it is sure."""
        self._held += text[self._told :]
        self._told = max(self._told, len(text))
        if self._strip and not self._begun:
            self._held = self._held.lstrip()

    def _move(self, length: int) -> None:
        """A character ends with the last token, or never will: what was whole before it is needed no more."""
        lead = self._window[self._read :]
        said = len(self._decode(lead)) if self._read else length
        # Of a window that says nothing nobody knows how it goes on: a blank at its beginning may be left out.
        if said and self._read:
            self._window, self._told = lead, said
        self._read = len(self._window)

    def _stopped(self) -> str:
        """What comes before a stop string, if one is there."""
        # What may begin one was held back, so none begins in what was given.
        found = [at for at in (self._held.find(word) for word in self._stop) if at >= 0]
        self.stopped = bool(found)
        return self._give(min(found)) if found else ""

    def _give(self, end: int, last: bool = True) -> str:
        new, self._held = self._held[:end], self._held[end:]
        self._begun = self._begun or bool(new)
        return new.rstrip() if self._strip and last else new

    def _may_become_stop(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = 0
        for word in self._stop:
            for n in range(min(len(word) - 1, len(self._held)), longest, -1):
                if self._held.endswith(word[:n]):
                    longest = n
                    break
        return longest
