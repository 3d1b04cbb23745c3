"""Conversations between their turns: which one a request goes on from, and who makes room.

A conversation is found by what it has read, so that clients need no session id: the one that shares the most columns
with the request is taken, and while it is in use nobody else finds it. What does not fit under the limit goes, the one
that was not used for the longest time first; its next turn reads everything again and is answered all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

from textkv.conversation import Conversation, Reuse


@dataclass
class ShelfStats:
    """What happened so far, in numbers of conversations."""

    new: int = 0
    continued: int = 0
    branched: int = 0
    dropped: int = 0


@dataclass
class Shelf:
    """Conversations that may go on.

    Args:
        new: makes an empty one.
        limit: bytes that all may hold together between their turns; None = no limit.
        share: columns that must be common before a conversation is copied for another that only begins like it.
    """

    new: Callable[[], Conversation]
    limit: int | None = None
    share: int = 64
    stats: ShelfStats = field(default_factory=ShelfStats)
    _kept: list[Conversation] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock)

    def take(self, foresee: Callable[[Conversation], Reuse]) -> Conversation:
        """The conversation that is best gone on from, or a new one. Give it back with `put`, unless it failed.

        Args:
            foresee: what a conversation would find of the request in its cache (`Conversation.foresee`).
        """
        with self._lock:
            told = [(foresee(kept), kept) for kept in self._kept]
            whole = [(reuse.reused, kept) for reuse, kept in told if reuse.how == "continued"]
            part = [(reuse.reused, kept) for reuse, kept in told if reuse.how == "cropped"]
            if whole:
                best = max(whole, key=lambda x: x[0])[1]
                self._kept = [kept for kept in self._kept if kept is not best]
                self.stats.continued += 1
                return best
            reused, best = max(part, key=lambda x: x[0], default=(0, None))
            if best is None or reused < self.share:
                self.stats.new += 1
                return self.new()
            # The other may still go on its own way.
            self.stats.branched += 1
            return best.fork()

    def put(self, conversation: Conversation) -> None:
        """Keeps a conversation whose turn is over, as the one used last."""
        with self._lock:
            self._kept.append(conversation)
            while self.limit is not None and self._kept and self._bytes() > self.limit:
                self._kept.pop(0)
                self.stats.dropped += 1

    def kv_bytes(self) -> int:
        """Bytes of all conversations that lie here."""
        with self._lock:
            return self._bytes()

    def __len__(self) -> int:
        return len(self._kept)

    def _bytes(self) -> int:
        return sum(kept.cache.kv_bytes() + kept.cache.host_bytes() for kept in self._kept)
