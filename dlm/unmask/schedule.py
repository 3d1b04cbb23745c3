"""The unmask schedule: how many tokens a step writes (its quota), and in which order the candidates come.

Two schedules. Even: the masks of a block spread over the steps that it has left, LLaDA's quota (larger shares first).
Timestep: Dream's `t = linspace(1, eps, S + 1)`, a step writes floor(masks * (1 - t[i+1] / t[i])), the last all that is
left; in fp32 that leaves the first steps empty. The authors take the mean of the batch's mask counts; here every row
has its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from dlm.canvas import Canvas

LEAST = torch.finfo(torch.float32).min  # what a masked slot without a score has: it goes before a closed one


@lru_cache(maxsize=1024)
def numbers(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64 [n], the same tensor for the same values, to be read only."""
    # Quotas are few and come again with every step: made once, they cost neither a launch nor a copy to the device.
    return torch.tensor(values, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class ScheduleStep:
    """Where each row stands in its schedule; numbers on the host, one of each row.

    Attributes:
        steps_left: steps that the active block has left, this one included, at least 1.
        index: number of this step among all steps of the generation.
        block_masks: masks of the active block.
        row_masks: masks of the whole row.
        device: of what is made of them.
    """

    steps_left: list[int]
    index: list[int]
    block_masks: list[int]
    row_masks: list[int]
    device: torch.device = torch.device("cpu")

    def put(self, values: Iterable[int]) -> torch.Tensor:
        """int64 [batch] on the device, to be read only."""
        return numbers(tuple(values), self.device)


class UnmaskSchedule:
    """Shares the steps out among the blocks and counts those of each row.

    Every block that has masks gets one step, and of the rest a share by its masks. Text between and before them counts
    for nothing, so that a row has the steps that it has alone, whatever the gaps of the others.

    Args:
        steps: of every row; None = as many as it has masks, one token each.

    Attributes:
        steps: int64 [batch], of each row in all.

    Raises:
        ValueError: fewer steps than blocks.
    """

    def __init__(self, canvas: Canvas, steps: int | None) -> None:
        masked = canvas.masked()[:, canvas.prompt :].long()
        number = (
            torch.arange(canvas.prompt, canvas.length, device=masked.device) - canvas.begin
        ) // canvas.block_length
        masks = masked.new_zeros(canvas.batch, canvas.blocks).index_add_(1, number, masked)
        blocks = (masks > 0).sum(1, keepdim=True)
        if steps is not None and steps < (most := int(blocks.max())):
            raise ValueError(
                f"steps={steps} are fewer than the {most} blocks; use at least {most} steps or longer blocks"
            )
        self.steps = masks.sum(1) if steps is None else torch.full_like(blocks[:, 0], steps)
        rest = (masks - 1).clamp(min=0).cumsum(1)
        # Rounded up along the running sum, so that early blocks get the larger share and the total is exact.
        shares = -(-(self.steps[:, None] - blocks) * rest // rest[:, -1:].clamp(min=1))
        each = shares.diff(dim=1, prepend=torch.zeros_like(blocks)) + (masks > 0)
        # One more: a finished row stands behind its last block.
        each = torch.cat([each, torch.ones_like(blocks)], 1)
        # On the host, where they are added and compared for less than a launch.
        self.given = each.tolist()
        self.first = (each.cumsum(1) - each).tolist()
        self.used = [0] * canvas.batch
        self.blocks: list[int] | None = None

    def step(self, canvas: Canvas, wanted: Sequence[bool]) -> ScheduleStep:
        """One step of the rows that are `wanted`: those with a candidate that holds a mask."""
        blocks = canvas.active_rows
        if self.blocks is not None and blocks != self.blocks:
            # A row that has just entered a block has used no step of it; rows enter at different forwards.
            pairs = zip(blocks, self.blocks, self.used, strict=True)
            self.used = [used if now == then else 0 for now, then, used in pairs]
        self.blocks = blocks
        given = [row[block] for row, block in zip(self.given, blocks, strict=True)]
        first = [row[block] for row, block in zip(self.first, blocks, strict=True)]
        step = ScheduleStep(
            steps_left=[max(1, all_ - used) for all_, used in zip(given, self.used, strict=True)],
            index=[at + used for at, used in zip(first, self.used, strict=True)],
            block_masks=canvas.block_masks,
            row_masks=canvas.left_rows,
            device=canvas.ids.device,
        )
        self.used = [used + bool(one) for used, one in zip(self.used, wanted, strict=True)]
        return step

    def take_rows(self, rows: torch.Tensor) -> None:
        """Keeps rows int64 [kept] of the batch."""
        kept = rows.tolist()
        self.steps = self.steps[rows.to(self.steps.device)]
        for name in ("given", "first", "used", "blocks"):
            held = getattr(self, name)
            setattr(self, name, None if held is None else [held[row] for row in kept])


def even_quota(step: ScheduleStep) -> list[int]:
    """Each row's part of an even split of its block's masks over the steps left, at least 1 of any masks."""
    # Ceiling division of what is left: larger shares first, and a step that wrote more makes later ones smaller.
    return [-(-masks // left) for masks, left in zip(step.block_masks, step.steps_left, strict=True)]


def at_least(counts: torch.Tensor, step: ScheduleStep) -> list[int]:
    """`counts` int64 [batch], or the even quota where that is more."""
    return [max(pair) for pair in zip(counts.tolist(), even_quota(step), strict=True)]


def timestep_shares(steps: torch.Tensor, eps: float) -> torch.Tensor:
    """fp32 [batch, most], 1 - t[i+1] / t[i]: the share of its masks that a row writes in step i of Dream's schedule.

    Args:
        steps: int64 [batch], of each row; behind its last one the shares are 1.
    """
    counts = steps.tolist()
    shares = torch.ones(len(counts), max(counts))
    for count in set(counts):
        # On the CPU and one by one: linspace rounds as the authors' does, which a formula for all rows would not.
        t = torch.linspace(1, eps, count + 1)
        shares[steps.cpu() == count, :count] = 1 - t[1:] / t[:-1]
    return shares.to(steps.device)


def timestep_share(step: ScheduleStep, shares: torch.Tensor) -> torch.Tensor:
    """fp32 [batch], each row's share of this step, of `timestep_shares`."""
    # A finished row stands behind its last step.
    index = step.put(min(at, shares.shape[1] - 1) for at in step.index)
    return shares.gather(1, index[:, None])[:, 0]


def timestep_quota(step: ScheduleStep, shares: torch.Tensor) -> torch.Tensor:
    """int64 [batch], Dream's schedule with `timestep_shares`; the last step of a block takes all that it has left."""
    share, masks = timestep_share(step, shares), step.put(step.block_masks)
    # int() of an fp32 product as in the authors' code: fp64 rounds some quotas to another whole number.
    quota = (step.put(step.row_masks).float() * share).long()
    return torch.where(step.put(step.steps_left) == 1, masks, torch.minimum(quota, masks))


def best(score: torch.Tensor, masked: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """bool [batch, r], the `counts` highest scores of each row, of what is masked; equals go by the lowest slot."""
    # On the host: a step waits for its scores in any case, and there sorting a few costs less than a launch.
    there = masked.cpu().numpy()
    key = _keys(score.cpu().numpy(), there)
    rows = np.arange(len(key))[:, None]
    taken = np.zeros_like(there)
    if max(counts) <= 1:
        taken[rows, key.argmin(1)[:, None]] = np.array(counts)[:, None] > 0
    else:
        taken[rows, key.argsort(1, kind="stable")] = np.arange(key.shape[1]) < np.array(counts)[:, None]
    return torch.from_numpy(taken & there).to(score.device)


def _keys(score: np.ndarray, there: np.ndarray) -> np.ndarray:
    """fp32 [batch, r] that rises as `score` falls; what is not `there` has inf."""
    # NaN would come first; a row without any finite logit still has to write something in the end.
    key = np.where(score > LEAST, -score, -LEAST)
    return key if there.all() else np.where(there, key, np.inf)


def ranks(score: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """int64 [batch, r], 0 for a row's highest score. Equals go by the lowest slot; what is not masked comes last."""
    order = ordered(score, masked).indices
    rank = torch.arange(order.shape[1], device=order.device).expand_as(order)
    # Inverts the permutation: order[k] = column of rank k becomes rank[column] = k.
    return torch.empty_like(order).scatter_(1, order, rank)


def ordered(score: torch.Tensor, masked: torch.Tensor) -> torch.return_types.sort:
    """Scores [batch, r] in descending order and their columns; what is not masked has -inf and comes last."""
    # NaN would sort first; a row without any finite logit still has to write something in the end.
    key = torch.where(masked, score.float().nan_to_num(nan=LEAST, neginf=LEAST), -torch.inf)
    return key.sort(dim=1, descending=True, stable=True)
