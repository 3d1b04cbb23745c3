"""Sentence vectors: `Embedder.load("minilm").embed(["a text", "another"])`.

A BERT whose last hidden states are averaged over a text's tokens and brought to length 1, as sentence-transformers
does it for all-MiniLM-L6-v2. Run by transformers itself: no further package.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from textkv.checkpoints import load_model, load_tokenizer
from textkv.models.loading import first_line, resolve

MOST_TOKENS = 256  # longer texts are cut, as all-MiniLM-L6-v2 was trained and as its own configuration says


class Embedder:
    """Texts to vectors of length 1, so that a dot product is a cosine.

    Attributes:
        dim: numbers of a vector.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, most: int = MOST_TOKENS) -> None:
        self._model, self._tokenizer, self._most = model.eval(), tokenizer, most
        self.dim: int = model.config.hidden_size

    @classmethod
    def load(cls, name: str = "minilm", device: str = "cpu") -> Embedder:
        """By name, folder or hub id.

        Raises:
            FileNotFoundError: not installed (the message has the command), or nothing to load there.
            ValueError: the name of a model that is no embedder.
        """
        place = resolve(name, "embedder")
        try:
            # The pooler and the heads of masked words say nothing about the states that are averaged.
            heads = r"(^|\.)pooler\.|^cls\.|^lm_head\."
            model = load_model(AutoModel.from_pretrained, place, unused=heads, dtype=torch.float32)
            return cls(model.to(device), load_tokenizer(AutoTokenizer.from_pretrained, place, model))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"embedder {name} cannot be loaded: {first_line(error)}") from None

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch: int = 32) -> torch.Tensor:
        """fp32 [n, dim] on the CPU, rows of length 1, in the order of `texts`; `batch` texts run together.

        Raises:
            ValueError: one string instead of a list of them, or a batch of none.
        """
        if isinstance(texts, str):
            raise ValueError(f"embed got one string of {len(texts)} characters; give a list: [text]")
        if batch < 1:
            raise ValueError(f"batch={batch}: at least 1 text must run at a time")
        vectors = torch.empty(len(texts), self.dim)
        # Texts of like length run together: a batch costs as much as its longest.
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        for first in range(0, len(order), batch):
            rows = order[first : first + batch]
            given = self._tokenizer(
                [texts[row] for row in rows], padding=True, truncation=True, max_length=self._most, return_tensors="pt"
            ).to(self._model.device)
            states = self._model(**given).last_hidden_state.float()
            real = given["attention_mask"][..., None].float()
            mean = (states * real).sum(1) / real.sum(1)
            vectors[rows] = F.normalize(mean, dim=-1).cpu()
        return vectors
