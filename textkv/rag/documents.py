"""A folder of .txt and .md files cut into overlapping chunks of words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from textkv.records import read_text

ENDINGS = (".txt", ".md")


@dataclass(frozen=True)
class Chunk:
    """A piece of a document.

    Attributes:
        source: the file, relative to the folder, with forward slashes.
        start: where the text begins in the file, in characters.
        text: as it stands in the file.
    """

    source: str
    start: int
    text: str


def cut(source: str, text: str, words: int = 120, overlap: int = 20) -> list[Chunk]:
    """Chunks of at most `words` words, each repeating the last `overlap` words of the one before.

    Raises:
        ValueError: an overlap that leaves no room to advance.
    """
    if not 0 <= overlap < words:
        raise ValueError(f"overlap={overlap} is not between 0 and words={words}; use {words // 6}")
    found = list(re.finditer(r"\S+", text))
    chunks = []
    for first in range(0, len(found), words - overlap):
        part = found[first : first + words]
        chunks.append(Chunk(source, part[0].start(), text[part[0].start() : part[-1].end()]))
        # A tail that lies wholly in the overlap has been said.
        if first + words >= len(found):
            break
    return chunks


def read_folder(folder: str | Path, words: int = 120, overlap: int = 20) -> list[Chunk]:
    """All chunks of a folder and the folders below it, files in the order of their names.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no text in it, or a file that is not UTF-8.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}")
    chunks = []
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file()):
        chunks += cut(path.relative_to(root).as_posix(), read_text(path), words, overlap)
    if not chunks:
        raise ValueError(f"no text in {folder}: it needs a .txt or .md file that is not empty")
    return chunks
