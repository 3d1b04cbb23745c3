"""Which answer tokens a training row hides, and what each hidden token weighs in the loss.

LLaDA's loss hides every token with one probability p and weighs the cross entropy by 1/p (arXiv 2502.09992, eq. 3).
Decoding never sees such an even mixture: it fills blocks from the left, and within a block first what is sure. So
half of the rows hide a random share, a quarter hides everything from some place on (with weights that fall with the
distance, since only the next tokens can be known), a quarter hides the digits and marks from some place on and shows
the rest. Any mixture of masks that does not look at the hidden values has the same optimum. The end tokens of the
tail are hidden on their own account: all, none or some.
"""

from __future__ import annotations

import torch

SHARES = (0.5, 0.25, 0.25)  # of the rows: random, suffix, digits of the suffix
FALL = 0.8  # weight of a suffix token against the one before it
MOST_WEIGHT = 8.0  # the limit of 1/p
TAIL_WEIGHT = 0.1  # of the tail against the answer


def hide(
    content: torch.Tensor, answer: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw masks for rows whose first `answer` slots are the answer and whose others are its tail of end tokens.

    Args:
        content: bool [rows, slots], True where a slot holds a digit or mark of the working.
        answer: slots of the answer, its first end token included.
        generator: CPU generator.

    Returns:
        hidden bool [rows, slots] and weights fp32 [rows, slots] (0 where nothing is hidden). A row with hidden answer
        tokens weighs at most 1, its tail at most 0.1.
    """
    rows, slots = content.shape
    kind = torch.multinomial(torch.tensor(SHARES), rows, replacement=True, generator=generator)
    cut = torch.randint(answer, (rows, 1), generator=generator)
    place = torch.arange(answer)
    order = torch.rand(rows, answer, generator=generator).argsort(1)
    # 1 to `answer` hidden tokens, each number equally likely: LLaDA's uniform t, but never 0.
    count = 1 + (torch.rand(rows, 1, generator=generator) * answer).long()
    suffix = place >= cut
    hidden = torch.where((kind == 0)[:, None], order < count, suffix)
    hidden &= (kind != 2)[:, None] | content[:, :answer]
    fall = torch.where((kind == 1)[:, None], FALL ** (place - cut).clamp(min=0), 1.0)
    weights = hidden * fall
    share = hidden.float().mean(1, keepdim=True).clamp(min=1 / answer)
    # 1/p of the loss with a ceiling: one hidden token of a long answer shall not weigh as much as all of them.
    weights *= (share * MOST_WEIGHT).clamp(max=1.0) / weights.sum(1, keepdim=True).clamp(min=1e-6)
    tail, tail_weights = _hide_tail(rows, slots - answer, generator)
    return torch.cat([hidden, tail], 1), torch.cat([weights, tail_weights], 1)


def _hide_tail(rows: int, slots: int, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
    share = torch.randint(3, (rows, 1), generator=generator) / 2
    some = torch.rand(rows, 1, generator=generator)
    hidden = torch.rand(rows, slots, generator=generator) < torch.where(share == 0.5, some, share)
    return hidden, hidden * (TAIL_WEIGHT / max(slots, 1))


def show_all(rows: int, slots: int, answer: int) -> torch.Tensor:
    """Weights fp32 [rows, slots] for a model that reads from left to right: the answer counts 1 a row, its tail 0.1."""
    weights = torch.full((rows, slots), TAIL_WEIGHT / max(slots - answer, 1))
    weights[:, :answer] = 1 / answer
    return weights
