"""What an unmasking rule is: which slots it wants logits of now, which token each gets, and which to write for good.

A rule is a frozen configuration; `begin` makes the unmasker of one generation, which counts per row. It sees logits
already aligned to slots and the canvas, never the model or the cache policy, so that every rule goes with every policy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch

from dlm.canvas import Canvas
from dlm.models.decoding_spec import DecodingSpec
from dlm.unmask.noise import Generators, Noise
from dlm.unmask.sampling import Sampler, Sampling
from textkv.registry import Registry

LogitWindow = tuple[torch.Tensor, torch.Tensor]
"""Slots [low, high) of each row, int64 [batch], whose logits the next forward can give."""


_LIMITS = "limits"


def number(default: float, low: float, high: float, hint: str, **options: Any) -> Any:
    """A field of a rule that must be a number in [low, high]; `hint` says what to use, `options` are the field's."""
    return field(default=default, metadata={_LIMITS: (low, high, hint)}, **options)


@dataclass(frozen=True)
class Choice:
    """What a step writes.

    tokens: int64 [batch, r], one for each candidate slot; commit: bool [batch, r], which of them to write.
    """

    tokens: torch.Tensor
    commit: torch.Tensor


class Unmasker(ABC):
    """One generation under a rule."""

    per_row: ClassVar[tuple[str, ...]] = ()
    """Attributes that are tensors [batch, ..]: rows of a batch leave them when they are finished."""

    def take_rows(self, rows: torch.Tensor) -> None:
        """Keeps rows int64 [kept] (CPU) of the batch."""
        for name in self.per_row:
            held = getattr(self, name)
            setattr(self, name, held[rows.to(held.device)])

    shadows: bool = False
    """Whether logits of written candidates are those of their shadows, see `dlm.shadows`."""
    revises: bool = False
    """Whether a written token may still change while its block is active."""

    @abstractmethod
    def candidates(self, canvas: Canvas, logit_window: LogitWindow) -> torch.Tensor:
        """Masked slots whose logits are wanted of the next forward: int64 [batch, r], ascending, -1 = none."""

    @abstractmethod
    def choose(self, logits: torch.Tensor, slots: torch.Tensor, canvas: Canvas) -> Choice:
        """What to write.

        Args:
            logits: [batch, r, V] of the candidates: row i predicts slot slots[:, i]. What stands at -1 is not read.
            slots: int64 [batch, r], what `candidates` gave, or some of it with the others replaced by -1.
        """

    @property
    def stats(self) -> dict[str, Any]:
        """What the rule counted beside the model's forwards, by name."""
        return {}


class Drafter(Unmasker):
    """An unmasker that guesses what coming forwards will write, and has several guesses verified by one."""

    early: int = 0
    """Places that a guess may come before its turn, see `dlm.nodes.lattice`."""

    @abstractmethod
    def drafts(self, canvas: Canvas) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The guesses: slots and tokens, int64 [batch, n] in order, -1 = none, and `verify` is asked; or None, and
        `choose` is."""

    @abstractmethod
    def verify(self, logits: torch.Tensor, slots: torch.Tensor, nodes: Any) -> tuple[Choice, torch.Tensor]:
        """What to write, and int64 [batch], the last node of each row that was right.

        Args:
            logits: [batch, nodes, r, V] of the candidates `slots` int64 [batch, r] on every node.
            nodes: `dlm.nodes.Nodes`, the canvases and which of them were computed.
        """


@dataclass(frozen=True)
class Rule(ABC):
    """Base of every rule's configuration.

    Attributes:
        sampling: how tokens are drawn.
        suppress: token ids that are never written; the mask always is one of them.
        logits_eos_inf: also never write the spec's first end token (LLaDA's option of that name).

    Raises:
        ValueError: a suppressed id that is no token id, or a `number` outside its limits.
    """

    sampling: Sampling = field(default=Sampling(), kw_only=True)
    suppress: tuple[int, ...] = field(default=(), kw_only=True)
    logits_eos_inf: bool = field(default=False, kw_only=True)

    name: ClassVar[str] = ""
    narrow: ClassVar[bool] = False
    """Of a block rule: whether the masks stand side by side in what it sees, however far apart they are; else column i
    is slot i of the block. For rules that look at each candidate alone and at their order."""

    def __post_init__(self) -> None:
        ids = self.suppress
        if not isinstance(ids, tuple) or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise ValueError(f"suppress={ids!r} is no tuple of token ids; use for example suppress=(126081,)")
        for f in fields(self):
            if _LIMITS in f.metadata:
                check_number(f.name, getattr(self, f.name), *f.metadata[_LIMITS])

    def check(self, config: Any, policy: Any, hooked: bool) -> None:  # noqa: B027 - most rules go with everything
        """Raises ValueError if the rule cannot go with a `DecodingConfig` or a cache policy.

        Args:
            hooked: whether the logits are changed on their way to the rule.
        """

    @property
    def idle(self) -> int:
        """Forwards in a row that write no mask although all is well."""
        return 0

    @abstractmethod
    def begin(self, canvas: Canvas, spec: DecodingSpec, generator: Generators, steps: int | None) -> Unmasker:
        """Starts a generation.

        Args:
            generator: of all random numbers; a list has one for each row; None = torch's own.
            steps: forwards that a rule with a schedule spreads a row's tokens over, and the most that any block rule
                needs; None = one for each mask of the row.

        Raises:
            ValueError: fewer steps than blocks, a generator on another device than the canvas, or a model that the
                rule cannot write with.
        """

    def sampler(self, canvas: Canvas, spec: DecodingSpec, generator: Generators) -> Sampler:
        """What draws this rule's tokens. Raises ValueError for a suppressed id that the model does not have."""
        if spec.vocabulary is not None and max(self.suppress, default=0) >= spec.vocabulary:
            raise ValueError(
                f"suppress={self.suppress!r}: the model has tokens 0 to {spec.vocabulary - 1}; leave out what is above"
            )
        # The mask first and always: a model may well predict it, and a written mask would never count as written.
        suppressed = (spec.mask_id, *self.suppress, *(spec.eos_ids[:1] if self.logits_eos_inf else ()))
        noise = Noise(generator, canvas.batch, canvas.ids.device)
        return Sampler(self.sampling, tuple(dict.fromkeys(suppressed)), noise)

    @property
    def expression(self) -> str:
        """The string that builds this rule again (without what `resolve_unmask` is given beside it)."""
        given = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in ("sampling", "guide") and value != f.default:
                given.append(f"{f.name}={value!r}")
        return f"{self.name}({','.join(given)})" if given else self.name


REGISTRY = Registry("unmasking rule", "agentkv.rules", "dlm.unmask.base.Rule")
register, find = REGISTRY.register, REGISTRY.find


def check_number(name: str, value: float, low: float, high: float, hint: str) -> None:
    """Raises ValueError unless `value` is a number in [low, high]; `hint` says what to use."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} is not in [{low:g}, {high:g}]; {hint}")
