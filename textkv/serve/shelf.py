"""Conversations between their turns: which one a request goes on from, and who makes room.

A conversation is found by what it has read, so that clients need no session id: the one that shares the most columns
with the request is taken, and while it is in use nobody else finds it. What does not fit under the limit goes to disk
if there is a folder for it, the one that was not used for the longest time first, and comes back as it was. One that is
dropped is read again by its next turn, and answered all the same.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import torch

from textkv.conversation import Conversation
from textkv.dialogue import Dialogue
from textkv.serve.omitted import GoesOn, compare, goes_on


@dataclass
class ShelfStats:
    """What happened so far, in numbers of conversations."""

    new: int = 0
    continued: int = 0
    branched: int = 0
    to_disk: int = 0
    from_disk: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class _OnDisk:
    """A conversation in a folder, and what it has read."""

    folder: Path
    seen: Dialogue
    forgotten: torch.Tensor
    bytes: int

    def continues(self, told: Dialogue) -> int:
        """Columns that a request need not read, if it goes on from here; else 0."""
        return _columns(compare(self.seen, told, self.forgotten))


@dataclass
class Shelf:
    """Conversations that may go on.

    Args:
        new: makes an empty one.
        load: reads one from a folder.
        limit: bytes that all in memory may hold together between their turns; None = no limit.
        disk: folder for those that do not fit; a folder of this shelf's own is made in it, and removed by `close`.
        disk_limit: bytes that may lie there; None = no limit.
        share: columns that must be common before a conversation is copied for another that only begins like it.

    Attributes:
        peak_bytes: the most that lay in memory between turns so far.
    """

    new: Callable[[], Conversation]
    load: Callable[[Path], Conversation] | None = None
    limit: int | None = None
    disk: Path | None = None
    disk_limit: int | None = None
    share: int = 64
    stats: ShelfStats = field(default_factory=ShelfStats)

    def __post_init__(self) -> None:
        self._kept: list[Conversation] = []
        self._stored: list[_OnDisk] = []
        self._lock, self._number, self.peak_bytes = Lock(), 0, 0
        self._own: Path | None = None
        self._folder: tempfile.TemporaryDirectory | None = None
        if self.disk is not None:
            self.disk.mkdir(parents=True, exist_ok=True)
            # Of this process alone: prompts of others are none of its business, and it removes what it made.
            self._folder = tempfile.TemporaryDirectory(
                prefix="conversations-", dir=self.disk, ignore_cleanup_errors=True
            )
            self._own = Path(self._folder.name)

    def take(self, told: Dialogue) -> Conversation:
        """The conversation that is best gone on from, or a new one. Give it back with `put`, unless it failed."""
        with self._lock:
            whole = max(((_columns(goes_on(x, told)), x) for x in self._kept), key=lambda x: x[0], default=(0, None))
            stored = max(((x.continues(told), x) for x in self._stored), key=lambda x: x[0], default=(0, None))
            if whole[0] and whole[0] >= stored[0]:
                self._kept = [kept for kept in self._kept if kept is not whole[1]]
                self.stats.continued += 1
                return whole[1]
            if stored[0] and (back := self._back(stored[1])) is not None:
                return back
            found = ((kept.foresee(told), kept) for kept in self._kept if not kept.forgotten.any())
            begins = ((reuse.reused, kept) for reuse, kept in found if reuse.how == "cropped")
            reused, part = max(begins, key=lambda x: x[0], default=(0, None))
            if part is None or reused < self.share:
                self.stats.new += 1
                return self.new()
            # The other may still go on its own way.
            self.stats.branched += 1
            return part.fork()

    def put(self, conversation: Conversation) -> None:
        """Keeps a conversation whose turn is over, as the one used last. Others make room first: what lies in memory
        is never more than the limit.
        """
        with self._lock:
            size = _bytes(conversation)
            while self.limit is not None and self._kept and self._bytes() + size > self.limit:
                self._make_room(self._kept.pop(0))
            if self.limit is not None and size > self.limit:
                self._make_room(conversation)
                return
            self._kept.append(conversation)
            self.peak_bytes = max(self.peak_bytes, self._bytes())

    def kv_bytes(self) -> int:
        """Bytes of all conversations that lie in memory."""
        with self._lock:
            return self._bytes()

    def disk_bytes(self) -> int:
        """Bytes of all that lie on disk."""
        return sum(stored.bytes for stored in self._stored)

    def close(self) -> None:
        """Forgets all, and removes what lies on disk."""
        with self._lock:
            self._kept, self._stored = [], []
            if self._folder is not None:
                self._folder.cleanup()

    def __len__(self) -> int:
        return len(self._kept) + len(self._stored)

    def _bytes(self) -> int:
        return sum(_bytes(kept) for kept in self._kept)

    def _make_room(self, conversation: Conversation) -> None:
        seen = conversation.seen
        if self._own is None or seen is None:
            self.stats.dropped += 1
            return
        folder = self._own / str(self._number)
        self._number += 1
        try:
            conversation.save(folder)
        except (OSError, ValueError):
            # A full disk, or a method that cannot be saved: the next turn reads it again.
            shutil.rmtree(folder, ignore_errors=True)
            self.stats.dropped += 1
            return
        size = sum(file.stat().st_size for file in folder.iterdir())
        self._stored.append(_OnDisk(folder, seen, conversation.forgotten, size))
        self.stats.to_disk += 1
        while self.disk_limit is not None and self._stored and self.disk_bytes() > self.disk_limit:
            shutil.rmtree(self._stored.pop(0).folder, ignore_errors=True)
            self.stats.dropped += 1

    def _back(self, stored: _OnDisk) -> Conversation | None:
        """The conversation from disk; None if what lies there is no longer whole."""
        self._stored = [other for other in self._stored if other is not stored]
        conversation = None
        with suppress(OSError, ValueError):
            conversation = self.load(stored.folder)
        shutil.rmtree(stored.folder, ignore_errors=True)
        if conversation is None:
            self.stats.dropped += 1
        else:
            self.stats.from_disk += 1
        return conversation


def _bytes(conversation: Conversation) -> int:
    return conversation.cache.kv_bytes() + conversation.cache.host_bytes()


def _columns(found: GoesOn | None) -> int:
    return 0 if found is None else found.columns
