"""The canvas: a batch of prompts, each followed by the masks that decoding turns into text.

A slot is an absolute column and never moves. Prompts are padded on the left, so that the generated part starts in the
same column for all rows; a row's block i is columns [P + i * B, min(P + (i + 1) * B, L)). How far a row has come is
read from its masks and nowhere else, so rows go on at their own pace, and one that is finished may leave. Text that was
given may also stand between and behind the masks ("infilling"). No model, no cache and no rule is known here.
"""

from __future__ import annotations

import torch


class Canvas:
    """Token ids and progress of one generation.

    Args:
        input_ids: int64 [batch, P] prompts, padded on the left.
        attention_mask: bool or int [batch, P], nonzero = real token; None = no padding.
        gen_length: G, masks after the input.
        block_length: B, slots of a block; the last block may be shorter.
        mask_id: id of the mask token.
        shift: 1 if row j of the model's logits predicts slot j + 1, 0 if it predicts slot j.
        prompt: P, where the first block begins; None = behind the input. Masks of the input from there on are written
            too, and its text stays.
        grid: attention blocks of a block-causal model, a multiple of `block_length`, counted from slot 0; every row's
            first real slot is a multiple of it. None = blocks are counted from the end of the prompt.
        first: int64 [batch], where what is given back of each row begins; None = behind the input.
        width: slots that are given back; None = G.

    Attributes:
        first, width: as above; other masks may follow, to the end of a grid's last block.
        begin: the first slot of block 0, which is before P where a prompt ends within a block of a grid.
        ids: int64 [batch, L], L = tokens of the input + G.
        prompt: P.
        length: L.
        rows: int64 [batch], the number of each row in the batch that was given.
        given: bool [batch, L], slots of the input that hold no mask to be written: text and padding.
        tail: int64 [batch], the first slot behind all text that was given.
        filled: bool [batch, L], slots behind the end of a row's text.
        valid: bool [batch, L], False = padding; None = no padding.
        real_start: int64 [batch], each row's first slot that is not padding; `real_start_cpu` is the same on the CPU.
        position_ids: int64 [batch, L], 0 at each row's first real slot (and at its padding).
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        gen_length: int,
        block_length: int,
        mask_id: int,
        shift: int,
        prompt: int | None = None,
        grid: int | None = None,
        first: torch.Tensor | None = None,
        width: int | None = None,
    ) -> None:
        batch, tokens = input_ids.shape
        self.prompt = tokens if prompt is None else prompt
        # Blocks of a grid stand at their positions, whatever the prompt: its end may lie in the first of them.
        self.grid, self.begin = grid, self.prompt - (self.prompt % block_length if grid is not None else 0)
        self.length = tokens + gen_length
        self.first = input_ids.new_full((batch,), tokens) if first is None else first
        self.width = gen_length if width is None else width
        self.block_length, self.mask_id, self.shift = block_length, mask_id, shift
        self.ids = torch.cat([input_ids, input_ids.new_full((batch, gen_length), mask_id)], 1)
        self.rows = torch.arange(batch, device=input_ids.device)
        columns = torch.arange(self.length, device=input_ids.device)[None]
        self.real_start = torch.zeros(batch, dtype=torch.int64, device=input_ids.device)
        self.valid: torch.Tensor | None = None
        if attention_mask is not None and not bool(attention_mask.bool().all()):
            # Padding is on the left and nowhere else, so its count is the first real column.
            self.real_start = (attention_mask == 0).sum(1)
            self.valid = columns >= self.real_start[:, None]
        self.real_start_cpu = self.real_start.cpu()
        # Positions count from a row's first real token: it gets those that it would have alone, without padding.
        self.position_ids = (columns - self.real_start[:, None]).clamp(min=0)
        self.given = (columns < self.prompt) | (self.ids != mask_id)
        # The last column counts most: its number is the largest that is multiplied by True.
        self.tail = (self.given * (columns + 1)).amax(1) if self.length else self.real_start
        self.filled = torch.zeros_like(self.given)
        self._held: torch.Tensor | None = None
        self._active: torch.Tensor | None = None
        self._progress: torch.Tensor | None = None

    @property
    def batch(self) -> int:
        """Rows."""
        return self.ids.shape[0]

    @property
    def generated(self) -> torch.Tensor:
        """The part behind the prompt, int64 [batch, L - P]: a view."""
        return self.ids[:, self.prompt :]

    @property
    def answer_slots(self) -> torch.Tensor:
        """int64 [batch, width], the slots that are given back."""
        return self.first[:, None] + torch.arange(self.width, device=self.first.device)

    @property
    def answers(self) -> torch.Tensor:
        """int64 [batch, width], what is given back, as it stands."""
        return self.ids.gather(1, self.answer_slots)

    @property
    def blocks(self) -> int:
        """N, blocks of the generated part."""
        return -(-(self.length - self.begin) // self.block_length)

    def block_range(self, block: int) -> tuple[int, int]:
        """Slots [start, end) of a block.

        Raises:
            ValueError: no such block.
        """
        if not 0 <= block < self.blocks:
            raise ValueError(f"block={block}: this canvas has blocks 0..{self.blocks - 1}")
        start = self.begin + block * self.block_length
        return max(start, self.prompt), min(start + self.block_length, self.length)

    def block_start(self, block: torch.Tensor) -> torch.Tensor:
        """First slot of each block of int64 [..]; L for block N, which is where a finished row stands."""
        return (self.begin + block * self.block_length).clamp(max=self.length)

    def span(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots [start, stop) that see each other around blocks int64 [batch]: the blocks, or the grid's that hold
        them."""
        start = self.block_start(block)
        if self.grid is None:
            return start, self.block_start(block + 1)
        start = start // self.grid * self.grid
        return start, (start + self.grid).clamp(max=self.length)

    def masked(self) -> torch.Tensor:
        """bool [batch, L], slots that still hold the mask."""
        return self.ids == self.mask_id

    @property
    def active(self) -> torch.Tensor:
        """int64 [batch] on the ids' device: each row's first block that has a mask or is held, N = none."""
        if self._active is None:
            masked = self.generated == self.mask_id
            # argmax of 0 and 1 is the first mask; where there is none it is 0, and N is put in its place.
            first = (masked.int().argmax(1) + self.prompt - self.begin) // self.block_length
            self._active = torch.where(masked.any(1), first, self.blocks)
            if self._held is not None:
                self._active = torch.minimum(self._active, self._held)
        return self._active

    def hold(self, blocks: torch.Tensor) -> None:
        """Keeps blocks int64 [batch] active although they may have no mask left, until the next call; N = none."""
        self._held, self._active, self._progress = blocks, None, None

    def _on_host(self) -> torch.Tensor:
        """Active blocks and masks left, int64 [2, batch] on the CPU: the one wait for the device that a step needs."""
        if self._progress is None:
            left = (self.generated == self.mask_id).sum(1)
            # Both in one tensor: every copy to the host waits for all kernels that were queued before it.
            self._progress = torch.stack([self.active, left]).cpu()
        return self._progress

    @property
    def active_cpu(self) -> torch.Tensor:
        """`active` on the CPU."""
        return self._on_host()[0]

    @property
    def left_cpu(self) -> torch.Tensor:
        """int64 [batch] on the CPU, masks left in each row."""
        return self._on_host()[1]

    @property
    def unfinished(self) -> torch.Tensor:
        """bool [batch] on the CPU, rows with a mask left or a block that is held."""
        return self.active_cpu < self.blocks

    @property
    def done(self) -> bool:
        """Whether no row has a mask left."""
        return not bool(self.unfinished.any())

    def commit(self, slots: torch.Tensor, tokens: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Writes tokens into the canvas for good.

        Args:
            slots: int64 [batch, r], -1 = none.
            tokens: int64 [batch, r].
            where: bool [batch, r], which of them to write.

        Returns:
            bool [batch, L], slots that were written now.
        """
        where = where & (slots >= 0)
        at = torch.where(where, slots, 0)
        # Several entries may point at slot 0 without meaning it; added up, those that mean a slot stand out.
        written = torch.zeros_like(self.ids).scatter_add_(1, at, where.long()) > 0
        value = torch.zeros_like(self.ids).scatter_add_(1, at, torch.where(where, tokens, 0))
        return self._write(written, value)

    def finish_row(self, after: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """Fills the slots behind an end token.

        Args:
            after: int64 [batch], slot of the end token; L = leave the row alone.
            token: int64 [batch], what to fill with.

        Returns:
            bool [batch, L], slots that hold another token now: masks that were filled, and text behind the end.
        """
        behind = torch.arange(self.length, device=self.ids.device)[None] > after[:, None]
        self.filled = self.filled | behind
        changed = behind & (self.ids != token[:, None])
        return self._write(changed, token[:, None].expand_as(self.ids))

    def take_rows(self, rows: torch.Tensor) -> None:
        """Keeps rows int64 [kept] (CPU), by their present numbers; the others leave the canvas."""
        there = rows.to(self.ids.device)
        for name in ("ids", "rows", "real_start", "position_ids", "given", "tail", "first", "filled"):
            setattr(self, name, getattr(self, name)[there])
        self._held = None if self._held is None else self._held[there]
        self.real_start_cpu = self.real_start_cpu[rows]
        if self.valid is not None:
            self.valid = self.valid[there] if bool((self.real_start_cpu > 0).any()) else None
        self._active = self._progress = None

    def repeated(self, times: int) -> Canvas:
        """A canvas with each row `times` times, one behind the other."""
        copy = object.__new__(Canvas)
        copy.__dict__ = dict(self.__dict__)
        names = ("ids", "rows", "real_start", "real_start_cpu", "position_ids", "given", "tail", "first", "filled")
        for name in (*names, "valid", "_held"):
            held = getattr(self, name)
            setattr(copy, name, None if held is None else held.repeat_interleave(times, 0))
        copy._active = copy._progress = None
        return copy

    def _write(self, where: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        # A new tensor, not a write in place: views handed out by `generated` keep what they showed.
        self.ids = torch.where(where, value, self.ids)
        self._active = self._progress = None
        return where
