"""Sharing in a model that is trained from scratch: atoms for everybody, and how layers choose among them.

    from textkv.masa import Sharing, share
    share(model, Sharing(atoms=4))                 # MASA-QKVO: trains as the model did, with fewer parameters

The baselines of the paper are the same parametrisation with special numbers: sequential sharing and repeat-all-over
have one coefficient of 1 a layer that is not trained, low rank has no atoms and a product for each layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from textkv.masa.mixture import EMBEDDING, NOISE, Coefficients, attach
from textkv.masa.projections import QKVO, check_projections, find_projections
from textkv.models.atoms import AtomGroup

HOW = ("network", "free", "sequential", "repeat")


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How attention weights are shared.

    Attributes:
        atoms: S, matrices of each projection for all layers; 0 = none, see `rank`.
        rank: of a product that every layer has for itself; 0 = none.
        projections: letters of "qkvo"; O is the most sensitive (section 2: variants QKV and QKVO).
        coefficients: "network" makes them of a trained embedding per layer (the paper), "free" trains them as they are,
            "sequential" lets layer l use atom floor(l * S / L), "repeat" atom l mod S.
        seed: of the first atoms.

    Raises:
        ValueError: nothing is shared, or a value outside of its limits.
    """

    atoms: int = 0
    rank: int = 0
    projections: str = QKVO
    coefficients: str = "network"
    seed: int = 0

    def __post_init__(self) -> None:
        check_projections(self.projections)
        for name in ("atoms", "rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative; use 0 for none")
        if not self.atoms and not self.rank:
            raise ValueError("atoms=0 and rank=0 leave nothing of a weight; use e.g. a third as many atoms as layers")
        if self.coefficients not in HOW:
            raise ValueError(f"coefficients={self.coefficients!r} is not known; use {', '.join(HOW)}")


def share(model: nn.Module, sharing: Sharing) -> nn.Module:
    """Give up the attention weights of `model`, a fresh one, for shared ones with the same spread; returns it.

    Atoms begin as the layers' weights did (their standard deviation) and coefficients at 1 / sqrt(S), so a combination
    has that spread again.

    Raises:
        ValueError: more atoms than layers, or projections that cannot be shared (`find_projections`).
    """
    generator = torch.Generator().manual_seed(sharing.seed)
    found = find_projections(model, sharing.projections)  # all are looked at before one is changed
    for letter, modules in found.items():
        check_atoms(sharing.atoms, len(modules))
        group, codings, network = _start(letter, modules, sharing, generator)
        attach(model, group, network, codings, learn=sharing.coefficients not in ("sequential", "repeat"))
    return model


def check_atoms(atoms: int, layers: int, what: str = "layers") -> None:
    """Raises ValueError for more atoms than layers."""
    if atoms > layers:
        raise ValueError(f"atoms={atoms} is more than the {layers} {what} that share them; use at most {layers}")


def _start(
    letter: str, modules: dict[str, nn.Linear], sharing: Sharing, generator: torch.Generator
) -> tuple[AtomGroup, Tensor | None, Coefficients | None]:
    """(first atoms and coefficients, embeddings or None, network or None) of one projection."""
    some, count, atoms = next(iter(modules.values())).weight, len(modules), sharing.atoms
    spread = torch.stack([module.weight.detach().float().std() for module in modules.values()]).mean()

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(some)

    first = drawn(atoms, *some.shape) * spread
    coefficients, network, embeddings = _coefficients(sharing, count, generator).to(some), None, None
    if sharing.coefficients == "network" and atoms:
        embeddings = drawn(count, EMBEDDING)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            network = Coefficients(atoms).to(some)
        network.start(embeddings)
        coefficients = network(embeddings).detach()
    rests, rank = (), sharing.rank
    if rank:
        # Both factors alike, and their product with the spread of a weight.
        each = (spread / rank**0.5) ** 0.5
        out, into = some.shape
        rests = tuple((drawn(out, rank) * each, drawn(rank, into) * each) for _ in range(count))
    names = tuple(f"{name}.weight" for name in modules)
    return AtomGroup(letter, names, first, coefficients, rests), embeddings, network


def _coefficients(sharing: Sharing, layers: int, generator: torch.Generator) -> Tensor:
    """First coefficients [layers, S]."""
    atoms, number = sharing.atoms, torch.arange(layers)
    if sharing.coefficients in ("sequential", "repeat") and atoms:
        chosen = number * atoms // layers if sharing.coefficients == "sequential" else number % atoms
        return nn.functional.one_hot(chosen, atoms).float()
    noise = 1 + NOISE * torch.randn(layers, atoms, generator=generator)
    return noise * atoms**-0.5 if atoms else noise


def parameters_of(sharing: Sharing, layers: int, shapes: dict[str, tuple[int, int]]) -> int:
    """How many numbers the attention weights keep: sum over projections of S d h + S L + L r (d + h), and d h for each
    layer of a projection that is not shared (section 2; biases are not counted).

    Args:
        shapes: (d, h) of each letter of "qkvo".
    """
    total = 0
    for letter, (d, h) in shapes.items():
        shared = sharing.atoms * (d * h + layers) + layers * sharing.rank * (d + h)
        total += shared if letter in sharing.projections else layers * d * h
    return total
