"""Passages that are found again: BM25 over words, or vectors of an embedder; on disk JSON and safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from textkv.checkpoints import check_tensors
from textkv.command import write_bytes, write_text
from textkv.rag.documents import Chunk
from textkv.rag.embedders import BM25, Embeds, load_embedder
from textkv.records import read

FORMAT = "textkv.rag 1"
RECORD, VECTORS = "index.json", "vectors.safetensors"
K1, B = 1.2, 0.75  # of Okapi BM25, the usual values


@dataclass(frozen=True)
class Passage:
    """A chunk that was found, with its score (higher is nearer)."""

    chunk: Chunk
    score: float


class Index:
    """Chunks with what finds them.

    Args:
        chunks: at least one.
        embedder: its name; "bm25" needs no vectors.
        vectors: fp32 [chunks, dim], else None.
        embeds: what embeds queries; None loads it by name at the first search.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        embedder: str = BM25,
        vectors: torch.Tensor | None = None,
        embeds: Embeds | None = None,
    ) -> None:
        if not chunks:
            raise ValueError("an index of 0 chunks finds nothing; give at least 1")
        if (vectors is None) != (embedder == BM25) or (vectors is not None and len(vectors) != len(chunks)):
            raise ValueError(f"embedder {embedder}: one vector for each of {len(chunks)} chunks, none for bm25")
        self.chunks, self.embedder, self.vectors, self._embeds = list(chunks), embedder, vectors, embeds
        self._ranking = _ranking([words_of(chunk.text) for chunk in self.chunks]) if vectors is None else None

    @classmethod
    def build(cls, chunks: Sequence[Chunk], embedder: str = BM25) -> Index:
        """Embeds all chunks (fp32), or counts their words for "bm25"."""
        if embedder == BM25 or not chunks:
            return cls(chunks, BM25)
        embeds = load_embedder(embedder)
        return cls(chunks, embedder, embeds.embed([chunk.text for chunk in chunks]).float().contiguous(), embeds)

    def search(self, query: str, k: int = 3) -> list[Passage]:
        """The k best passages, best first; ties in the order of the text. BM25 leaves out those without a shared word.

        Raises:
            ValueError: a query without a word, or k below 1.
        """
        if not words_of(query):
            raise ValueError(f"query {query!r} has no word; ask with at least one")
        if k < 1:
            raise ValueError(f"k={k}: at least 1 passage must be asked for")
        scores = self._by_words(query) if self.vectors is None else self._by_vectors(query)
        order = sorted(range(len(scores)), key=lambda number: -scores[number])[:k]
        return [Passage(self.chunks[n], scores[n]) for n in order if self.vectors is not None or scores[n] > 0]

    def _by_vectors(self, query: str) -> list[float]:
        self._embeds = self._embeds or load_embedder(self.embedder)
        return (self.vectors @ self._embeds.embed([query])[0].float()).tolist()

    def _by_words(self, query: str) -> list[float]:
        # A word that comes twice in a question is not asked for twice.
        return self._ranking.get_scores(sorted(set(words_of(query)))).tolist()

    def save(self, folder: str | Path) -> None:
        """Writes the folder; an index of ours that lies there is replaced.

        Raises:
            FileExistsError: a folder with other files in it, or a file.
        """
        place = Path(folder)
        if place.exists() and not (place.is_dir() and (not any(place.iterdir()) or _record(place))):
            raise FileExistsError(f"{folder} is there and is no index; choose another --out")
        place.mkdir(parents=True, exist_ok=True)
        record = {"format": FORMAT, "embedder": self.embedder, "chunks": [asdict(chunk) for chunk in self.chunks]}
        if self.vectors is None:
            (place / VECTORS).unlink(missing_ok=True)
        else:
            write_bytes(place / VECTORS, save({"vectors": self.vectors}))
        write_text(place / RECORD, json.dumps(record, ensure_ascii=False))

    @classmethod
    def load(cls, folder: str | Path, embedder: str | None = None) -> Index:
        """Reads an index; `embedder`, where given, must be the one that built it.

        Raises:
            FileNotFoundError: no index there.
            ValueError: built with another embedder, or damaged.
        """
        place = Path(folder)
        record = _record(place)
        if record is None:
            raise FileNotFoundError(f"no index in {folder}; run `python -m textkv.rag index DIR --out {folder}`")
        built = record.get("embedder")
        if not isinstance(built, str):
            raise ValueError(f"index {folder} is damaged (it names no embedder); build it again")
        # Vectors of two embedders have nothing in common: the search would give anything.
        if embedder is not None and embedder != built:
            raise ValueError(
                f"index {folder} was built with embedder {built}, not {embedder}; build it again or use it"
            )
        try:
            vectors = None if built == BM25 else load_file(place / VECTORS)["vectors"]
            if vectors is not None:
                check_tensors(place / VECTORS, [("vectors", vectors)])
            return cls([Chunk(**chunk) for chunk in record["chunks"]], built, vectors)
        except (KeyError, TypeError, AttributeError, OSError, SafetensorError, ValueError) as error:
            told = " ".join(str(error).split())
            raise ValueError(f"index {folder} is damaged ({told}); build it again") from None


def _ranking(words: list[list[str]]) -> Any:
    """BM25 over the words of every chunk."""
    try:
        import bm25s
    except ImportError:
        raise ValueError("bm25s is not installed: pip install 'agentkv[rag]', or use another --embedder") from None
    # Lucene's form: a word that most chunks have is worth little, and never less than nothing.
    ranking = bm25s.BM25(method="lucene", k1=K1, b=B, backend="numpy")
    ranking.index(words, show_progress=False)
    return ranking


def is_index(folder: Path) -> bool:
    """Whether an index of ours lies there."""
    return _record(folder) is not None


def words_of(text: str) -> list[str]:
    """Its words, in lower case."""
    return re.findall(r"\w+", text.lower())


def _record(place: Path) -> dict | None:
    try:
        record = read(place / RECORD)
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("format") == FORMAT else None
