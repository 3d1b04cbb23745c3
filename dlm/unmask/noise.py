"""Random numbers of a generation: from one generator for the whole batch, or from one for each row.

With one for all, what a row draws depends on the rows beside it. With one for each, a row draws only for its own
candidates and in its own order, so it gets the numbers that it would get alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Generators = torch.Generator | Sequence[torch.Generator] | None
"""Of the whole batch, or a list with one of each row; None = torch's own."""


class Noise:
    """Draws uniform numbers for the candidates of a batch.

    Args:
        generators: where they come from.
        batch: rows.
        device: where the numbers are made.

    Raises:
        ValueError: a generator on another device, or not one for each row.
    """

    def __init__(self, generators: Generators, batch: int, device: torch.device) -> None:
        single = not isinstance(generators, Sequence)
        self.common = generators if single else None
        self.own = None if single else list(generators)
        self.device = device
        if self.own is not None and len(self.own) != batch:
            raise ValueError(f"{len(self.own)} generators for {batch} rows; give one for each row, or one for all")
        if self.own is not None and len({id(one) for one in self.own}) < batch:
            raise ValueError(
                "two rows have the same generator, so what one draws depends on the other; make one for each"
            )
        # torch.rand fails on a foreign generator only at the first draw, in the middle of a generation.
        for one in self.own or [self.common]:
            if one is not None and not hasattr(one, "device"):
                raise ValueError(f"generator has {one!r}, which is none; give torch.Generator(), seeded by manual_seed")
            if one is not None and one.device.type != device.type:
                raise ValueError(
                    f"generator is on {one.device} and the canvas on {device}; build it as "
                    f"torch.Generator({device.type!r})"
                )

    def uniform(
        self, there: torch.Tensor, width: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Numbers in [0, 1), [batch, r, *width], for each entry of `there` bool [batch, r]; what stands elsewhere has
        no meaning."""
        shape = (*there.shape, *width)
        if self.own is None:
            return torch.rand(shape, generator=self.common, dtype=dtype, device=self.device)
        made = torch.zeros(shape, dtype=dtype, device=self.device)
        for row, generator in enumerate(self.own):
            size = (int(there[row].sum()), *width)
            made[row, there[row]] = torch.rand(size, generator=generator, dtype=dtype, device=self.device)
        return made

    def of_row(self, row: int) -> Noise:
        """The numbers of one row, a batch of its own."""
        return Noise(self.common if self.own is None else self.own[row : row + 1], 1, self.device)

    def take_rows(self, rows: torch.Tensor) -> None:
        """Keeps rows int64 [kept] of the batch."""
        if self.own is not None:
            self.own = [self.own[row] for row in rows.tolist()]
