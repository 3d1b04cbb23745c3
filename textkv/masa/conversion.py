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


@dataclass(frozen=True, eq=False)
class Plan:
    """A conversion but for how much goes: what the atoms miss is factored once, whatever reductions follow.

    Attributes:
        bare: the groups with their atoms alone.
        rests: what they miss, by the name of the weight; none for a conversion of atoms alone.
        kept: numbers of the attention weights that are not converted.
        plain_parameters: numbers of all attention weights.
    """

    bare: list[AtomGroup]
    cuts: list[tuple[int, int]]
    rests: dict[str, Rest]
    kept: int
    plain_parameters: int

    def at(self, reduction: float | None) -> Converted:
        """The groups at a reduction (see `Conversion`).

        Raises:
            ValueError: the atoms alone cost more than is left.
        """
        spent = self.kept + sum(group.parameters for group in self.bare)
        groups = self.bare
        if reduction is not None:
            offers = [(rest.values, rest.price, rest.most) for rest in self.rests.values()]
            ranks = deal(offers, int((1 - reduction) * self.plain_parameters) - spent)
            groups = [self._with_rests(group, dict(zip(self.rests, ranks, strict=True))) for group in self.bare]
        return Converted(
            groups, self.cuts, self.kept + sum(group.parameters for group in groups), self.plain_parameters
        )

    def _with_rests(self, group: AtomGroup, ranks: dict[str, int]) -> AtomGroup:
        pairs = (self.rests[name].cut(ranks[name]) for name in group.names)
        rests = tuple((left.to(group.atoms), right.to(group.atoms)) for left, right in pairs)
        return AtomGroup(group.projection, group.names, group.atoms, group.coefficients, rests)


@torch.no_grad()
def plan(model: PreTrainedModel, conversion: Conversion, rows: Tensor) -> Plan:
    """Measure a conversion of `model` on `rows` int64 [texts, tokens]; the model is left as it is.

    Raises:
        ValueError: projections that cannot be shared, more atoms than layers in a group, or groups of one layer.
    """
    everything = find_projections(model)
    found = {letter: everything[letter] for letter in conversion.projections}
    layers = len(next(iter(found.values())))
    # A group has as many layers as atoms at least, so that this is known before anything is measured.
    smallest = max(SMALLEST, conversion.atoms)
    check_groups(conversion.groups, layers)
    check_atoms(conversion.atoms, layers // conversion.groups, f"layers of a group (groups={conversion.groups})")
    check_groups(conversion.groups, layers, smallest)
    total = sum(module.weight.numel() for modules in everything.values() for module in modules.values())
    kept = total - sum(module.weight.numel() for modules in found.values() for module in modules.values())
    seen = calibrate(model, rows, found)
    cuts = cut(seen.drifts, conversion.groups, smallest)
    bare = [_group(letter, found[letter], span, conversion.atoms) for span in cuts for letter in conversion.projections]
    rests = {} if conversion.reduction is None else _rests(bare, model, seen)
    return Plan(bare, cuts, rests, kept, total)


@torch.no_grad()
def convert(model: PreTrainedModel, conversion: Conversion, rows: Tensor) -> Converted:
    """Replace the attention weights of `model` by combinations of atoms, calibrated on `rows` int64 [texts, tokens].

    Raises:
        ValueError: as `plan` and `Plan.at`; nothing is changed then.
    """
    made = plan(model, conversion, rows).at(conversion.reduction)
    for group in made.groups:
        attach(model, group)
    return made


def _group(letter: str, modules: dict[str, nn.Linear], span: tuple[int, int], atoms: int) -> AtomGroup:
    names = list(modules)[slice(*span)]
    basis, coefficients, _ = matrix_pca(torch.stack([modules[name].weight for name in names]), atoms)
    return AtomGroup(letter, tuple(f"{name}.weight" for name in names), basis, coefficients)


def _rests(bare: list[AtomGroup], model: nn.Module, seen: Calibration) -> dict[str, Rest]:
    """What the atoms of the groups miss of each weight, by its name."""
    rests: dict[str, Rest] = {}
    # Q, K and V of a layer have one moment, which is factored once.
    roots: dict[int, Tensor] = {}
    for name, made in ((name, weight) for group in bare for name, weight in group.weights().items()):
        moment = seen.moments[name.removesuffix(".weight")]
        if id(moment) not in roots:
            roots[id(moment)] = factor(moment)
        rests[name] = Rest.of(model.get_parameter(name).cpu() - made.cpu(), roots[id(moment)])
    return rests
