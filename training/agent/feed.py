"""What the trainer eats: an endless stream of packed batches, drawn pages mixed with recorded oracle episodes.

Runs in a loader process. Recorded episodes are read from a folder that a collector may still be filling.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from training.agent.drawn import drawn_turn
from training.agent.drawn_memory import drawn_episode, drawn_screen
from training.agent.episodes import EpisodeStore
from training.agent.packing import Batch, Packed, Packer, Turn, collate
from training.agent.rounds import drawn_rounds

POOL = 8
# share of the single drawn pages that are screens of memory episodes
SCREENS = 0.35


@dataclass(frozen=True)
class Mix:
    """How the data is composed: `images` screenshots per batch; shares of sequences that are single drawn pages (with
    `asks` questions each) and drawn memory episodes; the rest are recorded episodes (drawn pages while there are none).
    `rounds`: share of the memory episodes that are several in a row. `growing`: share of all sequences that are told in
    the chat that only grows.
    """

    images: int = 12
    drawn: float = 0.4
    memory: float = 0.3
    asks: int = 8
    rounds: float = 0.0
    growing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rounds", "growing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a share; use e.g. 0.5")
        if min(self.drawn, self.memory) < 0 or self.drawn + self.memory > 1:
            raise ValueError(
                f"drawn={self.drawn} and memory={self.memory} are not shares of one whole; use e.g. 0.4 and 0.3"
            )
        if self.images < 1 or self.asks < 1:
            raise ValueError(f"images={self.images}, asks={self.asks}: both must be at least 1")


class Feed(IterableDataset):
    """Endless `Batch`es. A pool of `POOL` batches' worth of sequences is sorted by length before it is cut, so that
    padding stays small; drawn pages and episodes mix freely.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, system: str, mix: Mix, folder: Path, seed: int) -> None:
        self.tokenizer, self.system, self.mix, self.folder, self.seed = tokenizer, system, mix, folder, seed

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rng = random.Random(self.seed * 1000 + (worker.id if worker else 0))
        if worker:
            os.nice(5)
        packer, store = Packer(self.tokenizer, self.system), EpisodeStore(self.folder)
        while True:
            store.refresh()
            pool, images = [], 0
            while images < POOL * self.mix.images:
                packed = packer.pack(self._turns(store, rng), growing=rng.random() < self.mix.growing)
                if packed.images:
                    pool.append(packed)
                    images += len(packed.images)
            pool.sort(key=lambda packed: len(packed.ids))
            batches = list(self._cut(pool))
            rng.shuffle(batches)
            for batch in batches:
                yield collate(batch, self.tokenizer.pad_token_id)

    def _cut(self, pool: list[Packed]) -> Iterator[list[Packed]]:
        batch: list[Packed] = []
        images = 0
        for packed in pool:
            batch.append(packed)
            images += len(packed.images)
            if images >= self.mix.images:
                yield batch
                batch, images = [], 0
        if batch:
            yield batch

    def _turns(self, store: EpisodeStore, rng: random.Random) -> list[Turn]:
        roll = rng.random()
        if roll < self.mix.memory:
            return drawn_rounds(rng) if rng.random() < self.mix.rounds else drawn_episode(rng)
        if roll < self.mix.memory + self.mix.drawn or not len(store):
            return drawn_screen(rng) if rng.random() < SCREENS else [drawn_turn(rng, self.mix.asks)]
        return store.sample(rng)
