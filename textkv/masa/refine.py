"""What the atoms miss, layer by layer: low rank in the norm that the layer's own inputs give (section 3, B3 and B4).

The paper writes ||L dW|| with L "the Cholesky factor" of X^T X; for y = x W and X^T X = R R^T (R lower) it is
||X dW|| = ||R^T dW||, so the transposed factor is taken here. How ranks are dealt out is not given either: here by
whitened energy for each number that a further rank costs, over all layers and projections together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

START, GROWTH = 1e-6, 10.0  # of the mean diagonal: what is added to a moment until it can be factored


def factor(moment: Tensor) -> Tensor:
    """R fp64 [in, in], lower, with R R^T = `moment` (X^T X / T, [in, in]) plus as little of the identity as it takes.

    Raises:
        ValueError: numbers that are not finite.
    """
    moment = moment.double()
    if not bool(moment.isfinite().all()):
        raise ValueError("inputs of a projection are not finite; take other weights or another text")
    identity, scale = torch.eye(len(moment), dtype=torch.float64), moment.diagonal().mean().clamp(min=1e-30)
    added = START
    while True:
        root, failed = torch.linalg.cholesky_ex(moment + added * scale * identity)
        if not failed:
            return root
        added *= GROWTH


@dataclass(frozen=True, eq=False)
class Rest:
    """The singular values of one layer's whitened rest and what is needed to cut it at a rank.

    `values` fp64 [n]; `left` fp64 [out, n] and `right` fp64 [n, in]: their first `rank` columns and rows, multiplied,
    are the best rest of that rank (torch's layout, W = left @ right).
    """

    values: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, weight: Tensor, root: Tensor) -> Rest:
        """Of a rest [out, in] and the factor R [in, in] of its inputs."""
        # y = x W^T in torch's layout: the paper's dW is weight.T.
        p, values, qt = torch.linalg.svd(root.T @ weight.double().T, full_matrices=False)
        half = values.sqrt()
        u = torch.linalg.solve_triangular(root.T, p * half, upper=True)
        return cls(values, (half[:, None] * qt).T, u.T)

    @property
    def price(self) -> int:
        """Numbers that a rank costs."""
        return self.left.shape[0] + self.right.shape[1]

    @property
    def most(self) -> int:
        """The rank from which on the plain matrix is no larger."""
        return min(len(self.values), self.left.shape[0] * self.right.shape[1] // self.price)

    def cut(self, rank: int) -> tuple[Tensor, Tensor]:
        """(left [out, rank], right [rank, in]) in fp32."""
        return self.left[:, :rank].float().contiguous(), self.right[:rank].float().contiguous()


def deal(rests: Sequence[tuple[Tensor, int, int]], budget: int) -> list[int]:
    """The rank of each rest: the next one goes where it takes away the most whitened energy for what it costs.

    Args:
        rests: (singular values, price of a rank, highest rank) of each.
        budget: numbers to spend on all together.

    Raises:
        ValueError: a negative budget.
    """
    if budget < 0:
        raise ValueError(f"budget={budget}: the atoms alone cost more than is left; use fewer atoms or a smaller cut")
    offers = sorted(
        (
            (-value * value / price, number, rank, price)
            for number, (values, price, most) in enumerate(rests)
            for rank, value in enumerate(values[:most].tolist())
        )
    )
    ranks = [0] * len(rests)
    for _, number, rank, price in offers:
        # Values fall, so a rank is reached in order unless a dearer one did not fit before it.
        if price <= budget and ranks[number] == rank:
            ranks[number], budget = rank + 1, budget - price
    return ranks
