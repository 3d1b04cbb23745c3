"""Weights as combinations of shared atoms, while a model runs and learns (MASA, arXiv 2508.04581, section 2).

`torch.nn.utils.parametrize` and no layer class of ours: projections stay `nn.Linear` with their bias, whatever asks for
`weight` gets the combined matrix, gradients reach atoms and coefficients by themselves, and taking it away again is one
call. What a layer learns for itself, its "coding", is the parametrisation's own tensor; atoms hang at every layer and
are one parameter. A combined matrix lives from forward to backward: training memory is that of an unshared model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from textkv.models.atoms import AtomGroup

EMBEDDING = WIDTH = 64
"""Of a layer's embedding and of the network that reads it; the paper's text gives neither."""
NOISE = 0.1
"""By what share coefficients of different layers differ at the start: equal layers would stay equal."""


class Coefficients(nn.Module):
    """A layer's embedding [64] to its coefficients [S]: three linear layers with GELU between them (section 2)."""

    def __init__(self, atoms: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(EMBEDDING, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, atoms)
        )

    @torch.no_grad()
    def start(self, embeddings: Tensor) -> None:
        """Let the coefficients of `embeddings` [layers, 64] begin at 1 / sqrt(S), give or take a tenth of it."""
        last = self.layers[-1]
        last.bias.zero_()
        made = self(embeddings)
        level = last.out_features**-0.5
        last.weight.mul_(NOISE * level / made.std().clamp(min=1e-6))
        last.bias.copy_(level - self(embeddings).mean(0))

    def forward(self, embedding: Tensor) -> Tensor:
        """[..., 64] -> [..., S]."""
        return self.layers(embedding)


class Dictionary(nn.Module):
    """The atoms [S, out, in] of one group of layers and, while it is trained, the network of their coefficients."""

    def __init__(self, atoms: Tensor, network: Coefficients | None = None) -> None:
        super().__init__()
        self.atoms, self.network = nn.Parameter(atoms), network

    def coefficients(self, coding: Tensor) -> Tensor:
        """The coefficients [S] that a layer's coding stands for."""
        return coding if self.network is None else self.network(coding)

    def forward(self, coding: Tensor) -> Tensor:
        """The combined weight [out, in] of the layer with that coding."""
        return torch.einsum("s,soi->oi", self.coefficients(coding), self.atoms)


class Mixture(nn.Module):
    """The parametrisation of one layer's weight: a combination of `dictionary`, plus left @ right where a rest is kept.

    Its own tensors are `original0`, the coding (coefficients [S], or an embedding [64] while a network makes them), and
    `original1` [out, rank] and `original2` [rank, in] of the rest.
    """

    def __init__(self, dictionary: Dictionary, coding: Tensor, rest: tuple[Tensor, Tensor] | tuple[()] = ()) -> None:
        super().__init__()
        self.dictionary, self._start = dictionary, (coding, *rest)

    def forward(self, coding: Tensor, *rest: Tensor) -> Tensor:
        """The weight [out, in]."""
        mixed = self.dictionary(coding)
        return mixed + rest[0] @ rest[1] if rest else mixed

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """What the layer begins with; called once when it is registered. The weight that was there is given up."""
        start, self._start = self._start, ()
        return tuple(part.clone() for part in start)


def attach(
    model: nn.Module,
    group: AtomGroup,
    network: Coefficients | None = None,
    codings: Tensor | None = None,
    learn: bool = True,
) -> Dictionary:
    """Put the combinations of `group` in the place of the weights that it names, in `model` itself.

    Args:
        network: makes the coefficients from `codings`, embeddings [layers, 64]; None = the group's own are learned.
        learn: whether codings are trained; fixed ones are the sharing baselines.
    """
    dictionary = Dictionary(group.atoms.clone(), network)
    codings = group.coefficients if codings is None else codings
    for layer, name in enumerate(group.names):
        module = model.get_submodule(name.rpartition(".")[0])
        rest = group.rests[layer] if group.rests else ()
        parametrize.register_parametrization(module, "weight", Mixture(dictionary, codings[layer], rest))
        module.parametrizations["weight"].original0.requires_grad_(learn)
    return dictionary


def mixtures(model: nn.Module) -> Iterator[tuple[str, nn.Linear, Mixture]]:
    """(name of the projection, projection, its parametrisation), in the order of the model."""
    for name, module in list(model.named_modules()):
        if parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations["weight"][0], Mixture):
            yield name, module, module.parametrizations["weight"][0]


@torch.no_grad()
def groups_of(model: nn.Module) -> list[AtomGroup]:
    """What the model has learned, by group; networks and embeddings are evaluated once and left behind."""
    members: dict[Dictionary, list[tuple[str, Sequence[Tensor]]]] = {}
    for name, module, mixture in mixtures(model):
        own = module.parametrizations["weight"]
        parts = [getattr(own, f"original{number}") for number in range(own.ntensors)]
        members.setdefault(mixture.dictionary, []).append((name, parts))
    made = []
    for dictionary, layers in members.items():
        coefficients = torch.stack([dictionary.coefficients(parts[0]) for _, parts in layers])
        rests = tuple((parts[1].detach(), parts[2].detach()) for _, parts in layers) if len(layers[0][1]) > 1 else ()
        letter = layers[0][0].rpartition(".")[2][0]
        names = tuple(f"{name}.weight" for name, _ in layers)
        made.append(AtomGroup(letter, names, dictionary.atoms.detach(), coefficients.detach(), rests))
    return made


@torch.no_grad()
def export(model: nn.Module) -> nn.Module:
    """Turn the combinations into plain weights, in `model` itself, which then knows nothing of atoms; returns it."""
    for _, module, _ in mixtures(model):
        weight = module.weight.detach().clone()
        _own_class(module)
        parametrize.remove_parametrizations(module, "weight")
        del module.weight  # left as a buffer where no gradient is wanted
        module.register_parameter("weight", nn.Parameter(weight))
    return model


def _own_class(module: nn.Module) -> None:
    """Gives a parametrised module a class that no other has: copies share the one that `parametrize` made, and taking
    the weight's property off that would leave the original without a weight."""
    shared = type(module)
    parts = {name: part for name, part in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, parts)
