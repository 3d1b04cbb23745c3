"""Passages that are found again: BM25 over words, or vectors of an embedder; on disk JSON and safetensors."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from textkv.rag.documents import Chunk
from textkv.rag.embedders import BM25, Embeds, load_embedder

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
        self._words = [Counter(words_of(chunk.text)) for chunk in self.chunks] if vectors is None else []
        self._holding = Counter(word for words in self._words for word in words)

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
        count = len(self._words)
        mean = sum(words.total() for words in self._words) / count or 1.0
        scores = [0.0] * count
        for word in set(words_of(query)):
            rarity = math.log(1 + (count - self._holding[word] + 0.5) / (self._holding[word] + 0.5))
            for number, words in enumerate(self._words):
                often = words[word]
                scores[number] += rarity * often * (K1 + 1) / (often + K1 * (1 - B + B * words.total() / mean))
        return scores

    def save(self, folder: str | Path) -> None:
        """Writes the folder; an index of ours that lies there is replaced.

        Raises:
            FileExistsError: a folder with other files in it, or a file.
        """
        place = Path(folder)
        if place.exists() and not (place.is_dir() and (not any(place.iterdir()) or _record(place))):
            raise FileExistsError(f"{folder} is there and is no index; choose another --out")
        place.mkdir(parents=True, exist_ok=True)
        (place / VECTORS).unlink(missing_ok=True)
        if self.vectors is not None:
            save_file({"vectors": self.vectors}, place / VECTORS)
        record = {"format": FORMAT, "embedder": self.embedder, "chunks": [asdict(chunk) for chunk in self.chunks]}
        (place / RECORD).write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, embedder: str | None = None) -> Index:
        """Reads an index; `embedder`, where given, must be the one that built it.

        Raises:
            FileNotFoundError: no index there.
            ValueError: built with another embedder.
        """
        place = Path(folder)
        record = _record(place)
        if record is None:
            raise FileNotFoundError(f"no index in {folder}; run `python -m textkv.rag index DIR --out {folder}`")
        built = record["embedder"]
        # Vectors of two embedders have nothing in common: the search would give anything.
        if embedder is not None and embedder != built:
            raise ValueError(
                f"index {folder} was built with embedder {built}, not {embedder}; build it again or use it"
            )
        vectors = None if built == BM25 else load_file(place / VECTORS)["vectors"]
        return cls([Chunk(**chunk) for chunk in record["chunks"]], built, vectors)


def words_of(text: str) -> list[str]:
    """Its words, in lower case."""
    return re.findall(r"\w+", text.lower())


def _record(place: Path) -> dict | None:
    try:
        record = json.loads((place / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("format") == FORMAT else None
