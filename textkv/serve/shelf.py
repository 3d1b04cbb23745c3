"""Conversations between their turns: which one a request goes on from, and who makes room.

A conversation is found by what it has read, so that clients need no session id: the one that shares the most columns
with the request is taken, and while it is in use nobody else finds it. What does not fit under the limit goes to the
machine's memory if there is room set aside for it (files in `HOST`), then to disk if there is a folder for it, the one
that was not used for the longest time first, and comes back as it was. One that is dropped is read again by its next
turn, and answered all the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

import numpy as np
import torch

from textkv.conversation import Conversation
from textkv.dialogue import Dialogue
from textkv.disk import NoSpace
from textkv.serve.folders import OwnFolder
from textkv.serve.omitted import AGREE, compare

HOST = Path("/dev/shm")  # files here lie in memory
ID = 8  # bytes of a token's id
LOST = (OSError, ValueError, RuntimeError, MemoryError)
"""What keeping a conversation elsewhere may raise, torch without memory too: it costs that conversation alone."""
TRIED = 8  # conversations that begin like a request and are asked whether they can be taken back to there


@dataclass
class ShelfStats:
    """What happened so far, in numbers of conversations."""

    new: int = 0
    continued: int = 0
    branched: int = 0
    to_host: int = 0
    from_host: int = 0
    to_disk: int = 0
    from_disk: int = 0
    dropped: int = 0


@dataclass(frozen=True, eq=False)
class Held:
    """A conversation on the shelf, in memory or in a folder, and what it has read.

    Attributes:
        line: the ids as bytes: of thousands of conversations all but a few are passed over by these, in no time.
        bytes: of its cache, or of its files.
        owner: whose it is; nobody else's requests go on from it.
        host: whether that folder lies in the machine's memory.
        back: of one in a folder: columns that it can take back, as far as was seen when it went there.
    """

    seen: Dialogue
    forgotten: torch.Tensor
    line: bytes
    bytes: int
    owner: str
    talk: Conversation | None = None
    folder: Path | None = None
    host: bool = False
    back: int = 0

    def continues(self, told: Dialogue, line: bytes, whole: bool) -> int:
        """Columns that a request need not read, if it goes on from here; else 0.

        Args:
            whole: only from all of it, which is seen at once; or only where pictures were left out, which takes a look
                at every token.
        """
        if line.startswith(self.line) != whole or not (whole or self.seen.images):
            return 0
        found = compare(self.seen, told, self.forgotten)
        if found is None:
            return 0
        # What is left out must lie between things that both have, the last of all that was read among them. Another
        # conversation begins alike too, with the same words of the system, and one that was edited shares marks of its
        # turns: taken for this one they would be answered from it, and leave it without its cache.
        alone = found.left_out and self.seen.columns - found.left_out[-1][1] < AGREE
        return 0 if alone else found.columns

    def begins(self, line: bytes) -> int:
        """Columns that a request begins with as this does."""
        n = min(len(self.line), len(line)) // ID
        mine, its = (np.frombuffer(x, np.int64, n) for x in (self.line, line))
        apart = mine != its
        return int(apart.argmax()) if apart.any() else n

    def reaches(self, line: bytes) -> bool:
        """Whether it may be taken back to where a request leaves it. In memory it is asked itself."""
        return self.talk is not None or self.seen.columns - self.begins(line) <= self.back


@dataclass
class Shelf:
    """Conversations that may go on.

    Args:
        new: makes an empty one.
        load: reads one from a folder.
        limit: bytes that all in memory may hold together between their turns; None = no limit.
        disk: folder for those that do not fit; a folder of this shelf's own is made in it, and removed by `close`.
        disk_limit: bytes that may lie there; None = no limit.
        host: bytes that may lie in the machine's memory, before anything goes to disk.
        share: columns that must be common before a conversation is copied for another that only begins like it.

    Attributes:
        peak_bytes: the most that lay in memory between turns so far.
    """

    new: Callable[[], Conversation]
    load: Callable[[Path], Conversation] | None = None
    limit: int | None = None
    disk: Path | None = None
    disk_limit: int | None = None
    host: int = 0
    share: int = 64
    stats: ShelfStats = field(default_factory=ShelfStats)

    def __post_init__(self) -> None:
        self._kept: list[Held] = []
        self._stored: list[Held] = []
        self._lock, self._number, self.peak_bytes = Lock(), 0, 0
        # Of this process alone: prompts of others are none of its business, and it removes what it made.
        self._folder = None if self.disk is None else OwnFolder(self.disk, "conversations-")
        self._host = OwnFolder(HOST, "agentkv-conversations-") if self.host else None

    def take(self, told: Dialogue, owner: str = "") -> Conversation:
        """The conversation of `owner` that is best gone on from, or a new one. Give it back with `put`, unless it
        failed.
        """
        line = _line(told)
        with self._lock:
            for exactly in (True, False):
                whole, stored = (self._best(held, told, line, owner, exactly) for held in (self._kept, self._stored))
                if whole[0] or stored[0]:
                    break
            if whole[0] and whole[0] >= stored[0]:
                self._kept.remove(whole[1])
                self.stats.continued += 1
                return whole[1].talk
            if stored[0] and (back := self._back(stored[1])) is not None:
                return back
            part = self._beginning(told, line, owner)
            if part is None:
                self.stats.new += 1
                return self.new()
            # The other may still go on its own way.
            self.stats.branched += 1
            return part

    def put(self, conversation: Conversation, owner: str = "") -> None:
        """Keeps a conversation whose turn is over, as the one used last. Others make room first: what lies in memory
        is never more than the limit.
        """
        with self._lock:
            seen = conversation.seen
            if seen is None:
                # Nobody knows what it has read: no request can go on from it.
                self.stats.dropped += 1
                return
            size = conversation.cache.kv_bytes() + conversation.cache.host_bytes()
            new = Held(seen, conversation.forgotten, _line(seen), size, owner, conversation)
            held = self._bytes()
            while self.limit is not None and self._kept and held + size > self.limit:
                held -= self._kept[0].bytes
                self._make_room(self._kept.pop(0))
            if self.limit is not None and size > self.limit:
                self._make_room(new)
                return
            self._kept.append(new)
            self.peak_bytes = max(self.peak_bytes, held + size)

    def kv_bytes(self) -> int:
        """Bytes of all conversations that lie in memory."""
        with self._lock:
            return self._bytes()

    def disk_bytes(self) -> int:
        """Bytes of all that lie on disk."""
        return self._stored_bytes(host=False)

    def host_bytes(self) -> int:
        """Bytes of all that lie in the machine's memory as files."""
        return self._stored_bytes(host=True)

    def close(self) -> None:
        """Forgets all, and removes what lies in files."""
        with self._lock:
            self._kept, self._stored = [], []
            for own in filter(None, (self._host, self._folder)):
                own.close()

    def __len__(self) -> int:
        return len(self._kept) + len(self._stored)

    def _bytes(self) -> int:
        return sum(kept.bytes for kept in self._kept)

    def _stored_bytes(self, host: bool) -> int:
        return sum(stored.bytes for stored in list(self._stored) if stored.host == host)

    def _best(self, held: list[Held], told: Dialogue, line: bytes, owner: str, whole: bool) -> tuple[int, Held | None]:
        """The one of which a request need not read the most columns, and how many."""
        found = ((x.continues(told, line, whole), x) for x in held if x.owner == owner)
        return max(found, key=lambda x: x[0], default=(0, None))

    def _beginning(self, told: Dialogue, line: bytes, owner: str) -> Conversation | None:
        """A copy of one that begins as a request does and can be taken back to where they part."""
        if told.columns <= self.share:
            return None
        held = (x for x in (*self._kept, *self._stored) if x.owner == owner and not x.forgotten.any())
        alike = (x for x in held if line[: self.share * ID] == x.line[: self.share * ID] and x.reaches(line))
        # A whole conversation is loaded for the columns that are alike: it has to spare a good deal more than one in
        # memory does.
        gains = ((x.begins(line) - (0 if x.talk else self.share), x) for x in alike)
        near = sorted((gain for gain in gains if gain[0] >= self.share), key=lambda x: -x[0])
        for _, held in near[:TRIED]:
            talk = held.talk or self._loaded(held)
            if talk is None:
                continue
            reuse = talk.foresee(told)
            if reuse.how == "cropped" and reuse.reused >= self.share:
                return talk.fork() if talk is held.talk else talk
        return None

    def _make_room(self, held: Held) -> None:
        # One after the other, the machine's memory first: what cannot go there, goes on.
        if not any(self._saved(held, own) for own in filter(None, (self._host, self._folder))):
            self.stats.dropped += 1
        self._keep_limits()

    def _saved(self, held: Held, own: OwnFolder) -> bool:
        """Puts a conversation into files. A disk that is full lets go of those used longest ago, of twice its size at
        most: it may be full of what is not ours."""
        freed, host = 0, own is self._host
        while True:
            folder = self._new_folder(own)
            try:
                back = _takes_back(held.talk)
                held.talk.save(folder)
                size = sum(file.stat().st_size for file in folder.iterdir())
            except LOST as error:
                # A full disk, no memory for a copy, or a method that cannot be saved: the next turn reads it again.
                shutil.rmtree(folder, ignore_errors=True)
                oldest = next((one for one in self._stored if not one.host), None)
                if host or oldest is None or freed >= 2 * held.bytes or not isinstance(error, NoSpace):
                    return False
                freed += oldest.bytes
                self._forget(oldest)
                self.stats.dropped += 1
                continue
            self._stored.append(replace(held, bytes=size, talk=None, folder=folder, host=host, back=back))
            self._count("to", host)
            return True

    def _keep_limits(self) -> None:
        """Who was used longest ago leaves what is too full: from the machine's memory to disk, from there for good."""
        while self.host_bytes() > self.host:
            self._to_disk(next(one for one in self._stored if one.host))
        while self.disk_limit is not None and self.disk_bytes() > self.disk_limit:
            self._forget(next(one for one in self._stored if not one.host))
            self.stats.dropped += 1

    def _to_disk(self, stored: Held) -> None:
        if self._folder is not None:
            folder = self._new_folder(self._folder)
            try:
                shutil.copytree(stored.folder, folder)
            except OSError:  # shutil's own error is one
                shutil.rmtree(folder, ignore_errors=True)
            else:
                shutil.rmtree(stored.folder, ignore_errors=True)
                self._stored[self._stored.index(stored)] = replace(stored, folder=folder, host=False)
                self._count("to", host=False)
                return
        self._forget(stored)
        self.stats.dropped += 1

    def _new_folder(self, own: OwnFolder) -> Path:
        self._number += 1
        return own.path / str(self._number)

    def _count(self, way: str, host: bool) -> None:
        name = f"{way}_{'host' if host else 'disk'}"
        setattr(self.stats, name, getattr(self.stats, name) + 1)

    def _back(self, stored: Held) -> Conversation | None:
        """The conversation from its files; None if it cannot be read."""
        conversation = self._loaded(stored)
        if conversation is not None:
            self._forget(stored)
            self._count("from", stored.host)
        return conversation

    def _loaded(self, stored: Held) -> Conversation | None:
        """What lies in files, which stay there; None if there is no room for it now. One that is no longer whole is
        forgotten, None too."""
        try:
            return self.load(stored.folder)
        except (MemoryError, torch.OutOfMemoryError):
            return None
        except LOST:
            self._forget(stored)
            self.stats.dropped += 1
            return None

    def _forget(self, stored: Held) -> None:
        self._stored.remove(stored)
        shutil.rmtree(stored.folder, ignore_errors=True)


def _takes_back(talk: Conversation) -> int:
    """The most columns that a conversation can take back."""
    least, most = 0, talk.cache.tokens_seen
    while least < most:
        middle = (least + most + 1) // 2
        try:
            talk.cache.check_crop(middle)
        except ValueError:
            most = middle - 1
        else:
            least = middle
    return least


def _line(dialogue: Dialogue) -> bytes:
    return dialogue.ids[0].contiguous().numpy().tobytes()
