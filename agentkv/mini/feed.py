"""What the trainer eats: an endless stream of packed batches, drawn pages mixed with recorded oracle episodes.

Runs in a loader process. Recorded episodes are read from a folder that a collector may still be filling.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast

from agentkv.mini.drawn import drawn_turn
from agentkv.mini.drawn_memory import drawn_episode
from agentkv.mini.episodes import EpisodeStore
from agentkv.mini.packing import Batch, Packer, Turn, collate


@dataclass(frozen=True)
class Mix:
    """How the data is composed: `images` screenshots per batch; shares of batches of single drawn pages (with `asks`
    questions each) and of drawn memory episodes; the rest are recorded episodes (drawn pages while there are none).
    """

    images: int = 10
    drawn: float = 0.4
    memory: float = 0.3
    asks: int = 8

    def __post_init__(self) -> None:
        if min(self.drawn, self.memory) < 0 or self.drawn + self.memory > 1:
            raise ValueError(
                f"drawn={self.drawn} and memory={self.memory} are not shares of one whole; use e.g. 0.4 and 0.3"
            )
        if self.images < 1 or self.asks < 1:
            raise ValueError(f"images={self.images}, asks={self.asks}: both must be at least 1")


class Feed(IterableDataset):
    """Endless `Batch`es; sequences of one batch are all drawn pages or all episodes, so that padding stays small."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, system: str, mix: Mix, folder: Path, seed: int) -> None:
        self.tokenizer, self.system, self.mix, self.folder, self.seed = tokenizer, system, mix, folder, seed

    def __iter__(self) -> Iterator[Batch]:
        os.nice(5)
        rng = random.Random(self.seed)
        packer = Packer(self.tokenizer, self.system)
        store = EpisodeStore(self.folder)
        while True:
            store.refresh()
            roll, sequences, images = rng.random(), [], 0
            while images < self.mix.images:
                packed = packer.pack(self._turns(roll, store, rng))
                if packed.images:
                    sequences.append(packed)
                    images += len(packed.images)
            yield collate(sequences, self.tokenizer.pad_token_id)

    def _turns(self, roll: float, store: EpisodeStore, rng: random.Random) -> list[Turn]:
        if roll < self.mix.memory:
            return drawn_episode(rng)
        if roll < self.mix.memory + self.mix.drawn or not len(store):
            return [drawn_turn(rng, self.mix.asks)]
        return store.sample(rng)
