"""Random input for every reader of JSON in the table of `tests.reliability.readers`."""

from __future__ import annotations

import io
import random
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from tests.reliability.readers import READERS

from .inputs import spelled
from .targets import Target


class Files(Target):
    """All other files of JSON, by the table of what reads them (`tests.reliability.readers`)."""

    share = 2.0
    promised = (ValueError, OSError)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.known: list[tuple[Any, Path, Path, Any, bytes | None]] = []
        for number, reader in enumerate(READERS.values()):
            place = folder / str(number)
            place.mkdir()
            path, right = reader.right(place)
            self.known.append((reader, place, path, right, path.read_bytes() if path.exists() else None))

    def make(self, rng: random.Random) -> tuple[int, bytes]:
        """Which one, and what is written there."""
        number = rng.randrange(len(self.known))
        data = spelled(rng, self.known[number][3])
        # In the header of another file it is a text.
        return number, data.decode("utf-8", "replace").encode() if self.known[number][0].text else data

    def read(self, made: tuple[int, bytes]) -> None:
        """Read it; where damage is local, nothing is raised."""
        reader, place, path, _, whole = self.known[made[0]]
        if whole is not None:
            path.write_bytes(whole)
        reader.put(path, made[1]) if reader.put else path.write_bytes(made[1])
        with redirect_stderr(io.StringIO()):
            try:
                reader.read(place)
            except self.promised as error:
                if reader.local and path.suffix != ".jsonl":
                    raise AssertionError("a part of it cost the whole") from error
                raise
