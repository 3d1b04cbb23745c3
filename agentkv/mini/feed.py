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
from agentkv.mini.episodes import EpisodeStore
from agentkv.mini.packing import Batch, Packer, collate


@dataclass(frozen=True)
class Mix:
    """How a batch is composed: `images` screenshots per batch, `drawn` = share of them that are drawn pages, `asks` per drawn page."""

    images: int = 24
    drawn: float = 0.5
    asks: int = 10

    def __post_init__(self) -> None:
        if not 0.0 <= self.drawn <= 1.0:
            raise ValueError(f"drawn={self.drawn} is not a share; use a number from 0 to 1, e.g. 0.5")
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
            episodes = len(store) > 0 and rng.random() >= self.mix.drawn
            sequences, images = [], 0
            while images < self.mix.images:
                turns = store.sample(rng) if episodes else [drawn_turn(rng, self.mix.asks)]
                packed = packer.pack(turns)
                if packed.images:
                    sequences.append(packed)
                    images += len(packed.images)
            yield collate(sequences, self.tokenizer.pad_token_id)
