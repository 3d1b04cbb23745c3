"""The text side of episodes: turns, windows of turns, vectors, clusters and their representatives (stage 1 of
EpiCache, arXiv 2509.17396). No forward of the language model, but for vectors that are its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textkv.reuse.chat import words

Embed = Callable[[Sequence[str]], torch.Tensor]
"""Texts to vectors, float [n, width] of any device: a method of a sentence embedder, a call of an ONNX session, ..."""


@dataclass(frozen=True)
class Turn:
    """What somebody said."""

    speaker: str
    text: str

    def __str__(self) -> str:
        return f'{self.speaker} said, "{self.text}"'


def windows(turns: Sequence[Turn], size: int) -> list[str]:
    """The conversation in pieces of `size` turns, the last one shorter: each a text, a line per turn."""
    return ["\n".join(map(str, turns[first : first + size])) for first in range(0, len(turns), size)]


class Encoder:
    """An embedder that is checked: unit vectors of one width, whatever is behind it.

    Args:
        embed: texts to vectors.

    Attributes:
        width: numbers of a vector; None before the first text.
    """

    def __init__(self, embed: Embed, width: int | None = None) -> None:
        self._embed, self.width = embed, width

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors fp32 [n, width] on the CPU.

        Raises:
            ValueError: the embedder failed, or gave another number of vectors, another width than before, or numbers
                that are not finite. Nothing has changed then.
        """
        try:
            found = torch.as_tensor(self._embed(list(texts)))
        except Exception as error:  # whatever a stranger's code raises, the caller hears what failed
            raise ValueError(f"the embedder failed on {len(texts)} texts: {type(error).__name__}: {error}") from error
        if found.dim() != 2 or len(found) != len(texts) or not found.shape[1] or found.is_complex():
            raise ValueError(
                f"the embedder gave shape {tuple(found.shape)} for {len(texts)} texts, of {found.dtype}; it must be "
                "[n, width], of real numbers"
            )
        if self.width not in (None, found.shape[1]):
            raise ValueError(
                f"the embedder gave {found.shape[1]} numbers for a text, earlier ones have {self.width}; "
                "use the embedder that it was begun with"
            )
        if not bool(found.isfinite().all()):
            raise ValueError("the embedder gave numbers that are not finite")
        self.width = found.shape[1]
        return F.normalize(found.detach().float().cpu(), dim=-1)


def own_vectors(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layer: int = 0, most: int = 256) -> Embed:
    """An embedder that needs no second model: the mean of a text's hidden states behind `layer` layers of the language
    model, 0 = its token embeddings, which cost no forward.

    Args:
        most: tokens of a text that count.

    Raises:
        ValueError: a model without so many layers.
    """
    layers = model.config.get_text_config().num_hidden_layers
    if not 0 <= layer <= layers:
        raise ValueError(f"layer={layer}: the model has {layers}; 0 = its token embeddings")

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> torch.Tensor:
        """fp32 [n, hidden size]; texts run one by one, so that none is padded."""
        vectors = []
        for text in texts:
            given = torch.tensor([words(tokenizer, text)[:most] or [0]], device=model.device)
            if layer:
                states = model(given, output_hidden_states=True, use_cache=False).hidden_states[layer]
            else:
                states = model.get_input_embeddings()(given)
            vectors.append(states[0].float().mean(0))
        return torch.stack(vectors)

    return embed


@dataclass(frozen=True, eq=False)
class Cluster:
    """Windows of one topic.

    Attributes:
        centre: fp32 [width], of length 1.
        members: numbers of its windows, ascending.
        representatives: numbers of those nearest to the centre, nearest first.
    """

    centre: torch.Tensor
    members: tuple[int, ...]
    representatives: tuple[int, ...]


def clustered(vectors: torch.Tensor, episodes: int, medoids: int) -> list[Cluster]:
    """k-means of unit vectors [n, width] into at most `episodes` clusters, in the order of their first windows.

    There are as many clusters as there are different windows, where these are fewer.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    count = min(episodes, len(vectors.unique(dim=0)))
    labels = torch.zeros(len(vectors), dtype=torch.long) if count == 1 else _labels(vectors, count)
    groups = [(labels == label).nonzero()[:, 0].tolist() for label in range(count)]
    return [cluster_of(vectors, members, medoids) for members in sorted(filter(None, groups))]


def cluster_of(vectors: torch.Tensor, members: Sequence[int], medoids: int) -> Cluster:
    """The cluster of these windows. Its centre has length 1: the released code compares with a plain mean, which
    favours tight clusters."""
    own = vectors[list(members)]
    centre = F.normalize(own.mean(0), dim=-1)
    # Ties to the earlier window: a stable order is the same on every machine.
    nearest = (own @ centre).sort(descending=True, stable=True).indices[:medoids].tolist()
    return Cluster(centre, tuple(members), tuple(members[i] for i in nearest))


def _labels(vectors: torch.Tensor, count: int) -> torch.Tensor:
    try:
        from sklearn.cluster import KMeans
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "clustering needs scikit-learn: pip install 'agentkv[conversations]', or use episodes=1"
        ) from None
    fitted = KMeans(count, init="k-means++", n_init=10, random_state=42).fit(vectors.numpy())
    return torch.from_numpy(fitted.labels_).long()
