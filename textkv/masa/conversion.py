"""A pretrained model in terms of atoms, without training (MASA, arXiv 2508.04581, section 3).

Layers are put into groups by what they would predict, each group's matrices become combinations of their principal
ones, and what is left of the budget goes into low rank rests in the norm of the layers' own inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from textkv.masa.calibration import Calibration, calibrate
from textkv.masa.grouping import SMALLEST, check_groups, cut
from textkv.masa.mixture import attach
from textkv.masa.pca import matrix_pca
from textkv.masa.projections import QKVO, check_projections, find_projections
from textkv.masa.refine import Rest, deal, factor
from textkv.masa.sharing import check_atoms
from textkv.models.atoms import AtomGroup


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How a pretrained model is converted.

    Attributes:
        atoms: S of each group and projection; 0 = none, every layer gets low rank alone.
        groups: of consecutive layers, at least two and at least `atoms` in each.
        reduction: share of all attention weights (Q, K, V, O) that goes; None = the atoms alone, no rests.
        projections: letters of "qkvo" that are converted.

    Raises:
        ValueError: a value outside of its limits.
    """

    atoms: int
    groups: int = 1
    reduction: float | None = 0.2
    projections: str = QKVO

    def __post_init__(self) -> None:
        check_projections(self.projections)
        if self.atoms < 0 or (not self.atoms and self.reduction is None):
            raise ValueError(f"atoms={self.atoms} leaves nothing of the weights; use at least 1")
        if self.groups < 1:
            raise ValueError(f"groups={self.groups} must be at least 1")
        if self.reduction is not None and not 0.0 <= self.reduction < 1.0:
            raise ValueError(f"reduction={self.reduction} is not a share of the weights below 1; use e.g. 0.2")


@dataclass(frozen=True, eq=False)
class Converted:
    """The groups, where layers were cut, and the numbers that all attention weights keep and had."""

    groups: list[AtomGroup]
    cuts: list[tuple[int, int]]
    parameters: int
    plain_parameters: int

    @property
    def reduction(self) -> float:
        """Share of the attention weights that is gone."""
        return 1 - self.parameters / self.plain_parameters


@torch.no_grad()
def convert(model: PreTrainedModel, conversion: Conversion, rows: Tensor) -> Converted:
    """Replace the attention weights of `model` by combinations of atoms, calibrated on `rows` int64 [texts, tokens].

    Raises:
        ValueError: projections that cannot be shared, more atoms than layers in a group, groups of one layer, or a
            reduction that the atoms alone exceed; nothing is changed then.
    """
    everything = find_projections(model)
    found = {letter: everything[letter] for letter in conversion.projections}
    layers = len(next(iter(found.values())))
    # A group has as many layers as atoms at least, so that this is known before anything is measured.
    smallest = max(SMALLEST, conversion.atoms)
    check_atoms(conversion.atoms, layers // conversion.groups, f"layers of a group (groups={conversion.groups})")
    check_groups(conversion.groups, layers, smallest)
    total = sum(module.weight.numel() for modules in everything.values() for module in modules.values())
    kept = total - sum(module.weight.numel() for modules in found.values() for module in modules.values())
    seen = calibrate(model, rows, found)
    cuts = cut(seen.drifts, conversion.groups, smallest)
    bare = [_group(letter, found[letter], span, conversion.atoms) for span in cuts for letter in conversion.projections]
    spent = kept + sum(group.parameters for group in bare)
    groups = bare
    if conversion.reduction is not None:
        groups = _with_rests(bare, model, seen, int((1 - conversion.reduction) * total) - spent)
    for group in groups:
        attach(model, group)
    return Converted(groups, cuts, kept + sum(group.parameters for group in groups), total)


def _group(letter: str, modules: dict[str, nn.Linear], span: tuple[int, int], atoms: int) -> AtomGroup:
    names = list(modules)[slice(*span)]
    basis, coefficients, _ = matrix_pca(torch.stack([modules[name].weight for name in names]), atoms)
    return AtomGroup(letter, tuple(f"{name}.weight" for name in names), basis, coefficients)


def _with_rests(bare: list[AtomGroup], model: nn.Module, seen: Calibration, budget: int) -> list[AtomGroup]:
    """The groups with low rank rests that cost `budget` numbers together."""
    rests: dict[str, Rest] = {}
    # Q, K and V of a layer have one moment, which is factored once.
    roots: dict[int, Tensor] = {}
    for name, made in ((name, weight) for group in bare for name, weight in group.weights().items()):
        moment = seen.moments[name.removesuffix(".weight")]
        if id(moment) not in roots:
            roots[id(moment)] = factor(moment)
        rests[name] = Rest.of(model.get_parameter(name).cpu() - made.cpu(), roots[id(moment)])
    offers = [(rest.values, rest.price, rest.most) for rest in rests.values()]
    ranks = dict(zip(rests, deal(offers, budget), strict=True))
    return [
        AtomGroup(
            group.projection,
            group.names,
            group.atoms,
            group.coefficients,
            tuple(tuple(part.to(group.atoms) for part in rests[name].cut(ranks[name])) for name in group.names),
        )
        for group in bare
    ]
