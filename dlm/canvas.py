"""The canvas: a batch of prompts, each followed by the masks that decoding turns into text.

A slot is an absolute column and never moves. Prompts are padded on the left, so that the generated part starts in the
same column for all rows; a row's block i is columns [P + i * B, min(P + (i + 1) * B, L)). How far a row has come is
read from its masks and nowhere else, so rows go on at their own pace, and one that is finished may leave. Text that was
given may also stand between and behind the masks ("infilling"). No model, no cache and no rule is known here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
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
        heads: where each row's first mask stood at the beginning, L = it had none.
        ends: tokens whose first appearance behind the text that was given is looked for, see `ended`; set by the loop.
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
        self.ends: tuple[int, ...] = ()
        self._held: torch.Tensor | None = None
        self._behind: np.ndarray | None = None  # slots behind the text that was given, L before
        # What was read of the ids as they stand, by name, and what follows from the active blocks.
        self._seen: dict[str, Any] = {}
        self._of_blocks: tuple[list[int], dict[str, Any]] = ([], {})
        self.heads = self._on_host()[2]

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

    def written(self, revised: bool) -> torch.Tensor:
        """int64 [batch], tokens of each row's answer before its first mask.

        Args:
            revised: only those before its active block, whose tokens may still change.
        """
        first = (
            self.block_start(self.active)
            if revised
            else torch.where(self.left > 0, self._first_mask() + self.prompt, self.length)
        )
        return (first - self.first).clamp(min=0, max=self.width)

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

    def span_of(self, row: int, block: int) -> tuple[int, int]:
        """`span` of one row's block. Text in front of the row's first mask is no part of it: how much of that shares
        the mask's block depends on where the other rows' gaps begin."""
        start = min(self.begin + block * self.block_length, self.length)
        if self.grid is None:
            stop = min(start + self.block_length, self.length)
            return max(start, min(self.heads[row], stop)), stop
        start = start // self.grid * self.grid
        return start, min(start + self.grid, self.length)

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
        return self._once("masked", lambda: self.ids == self.mask_id)

    @property
    def left(self) -> torch.Tensor:
        """int64 [batch] on the ids' device, masks left in each row."""
        return self._once("left", lambda: self.masked()[:, self.prompt :].sum(1))

    @property
    def active(self) -> torch.Tensor:
        """int64 [batch] on the ids' device: each row's first block that has a mask or is held, N = none."""
        if "rows" in self._seen:
            # Known on the host, where it seldom changes: made again only then.
            return self._by_block("active", lambda: torch.tensor(self.active_rows, device=self.ids.device))
        return self._once("active", self._first_block)

    @property
    def block_slots(self) -> torch.Tensor:
        """int64 [batch, B], the slots of each row's active block; -1 where it is shorter."""

        def made() -> torch.Tensor:
            start, end = self.block_start(self.active)[:, None], self.block_start(self.active + 1)[:, None]
            slots = start + torch.arange(self.block_length, device=start.device)
            return slots.masked_fill(slots >= end, -1)

        return self._by_block("slots", made)

    @property
    def block_host(self) -> tuple[np.ndarray, np.ndarray]:
        """`block_slots` on the host, int64 [batch, B], and which of them hold the mask, bool [batch, B]."""

        def made() -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], np.ndarray]:
            start = self.begin + np.array(self.active_rows)[:, None] * self.block_length
            slots = start + np.arange(self.block_length)
            there = slots < self.length
            return np.where(there, slots, -1), (np.arange(len(slots))[:, None], np.where(there, slots, 0)), there

        slots, at, there = self._by_block("table", made)
        return slots, self._once("block", lambda: (self.host[at] == self.mask_id) & there)

    @property
    def block_masks(self) -> list[int]:
        """Masks left in each row's active block."""
        return self._once("block_masks", lambda: self.block_host[1].sum(1).tolist())

    @property
    def block_index(self) -> torch.Tensor:
        """`block_slots` with 0 for -1, to gather by."""
        return self._by_block("index", lambda: self.block_slots.clamp(min=0))

    def hold(self, blocks: torch.Tensor) -> None:
        """Keeps blocks int64 [batch] active although they may have no mask left, until the next call; N = none."""
        self._held = blocks
        # The ids are the same, what is read of them by block is not.
        self._seen = {name: self._seen[name] for name in ("ids", "masked") if name in self._seen}

    def _first_mask(self) -> torch.Tensor:
        """int64 [batch], the first mask of each row, counted from P; 0 where there is none."""
        return self._once("first_mask", lambda: self.masked()[:, self.prompt :].byte().argmax(1))

    def _first_block(self) -> torch.Tensor:
        active = torch.where(
            self.left > 0, (self._first_mask() + (self.prompt - self.begin)) // self.block_length, self.blocks
        )
        return active if self._held is None else torch.minimum(active, self._held)

    def _once(self, name: str, made: Callable[[], Any]) -> Any:
        """What `made` gives, once for the ids as they stand."""
        if name not in self._seen:
            self._seen[name] = made()
        return self._seen[name]

    def _by_block(self, name: str, made: Callable[[], Any]) -> Any:
        """What `made` gives, once for the blocks that are active now."""
        if "rows" not in self._seen:
            return self._once(name, made)
        if self._of_blocks[0] != self.active_rows:
            self._of_blocks = self.active_rows, {}
        known = self._of_blocks[1]
        if name not in known:
            known[name] = made()
        return known[name]

    @property
    def host(self) -> np.ndarray:
        """The ids on the host, int64 [batch, L], to be read: the one wait for the device that a step needs. What is
        counted, compared and looked up row by row costs less there than a launch on the device."""
        return self._once("ids", lambda: self.ids.cpu().numpy())

    def _on_host(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Masks left, active blocks, first masks (L = none) and first ends (L = none) of all rows."""
        return self._once("rows", self._read)

    def _read(self) -> tuple[list[int], list[int], list[int], list[int]]:
        masked = self.host[:, self.prompt :] == self.mask_id
        left, first = masked.sum(1).tolist(), masked.argmax(1).tolist()
        first = [self.prompt + at if masks else self.length for at, masks in zip(first, left, strict=True)]
        active = [(at - self.begin) // self.block_length if at < self.length else self.blocks for at in first]
        if self._held is not None:
            active = [min(one, other) for one, other in zip(active, self._held.tolist(), strict=True)]
        return left, active, first, self._first_ends()

    def _first_ends(self) -> list[int]:
        """The first slot of each row behind the given text that holds an end, L = none; empty if none is looked for."""
        if not self.ends:
            return []
        if self._behind is None:
            slots = np.arange(self.length)
            self._behind = np.where(slots >= self.tail.cpu().numpy()[:, None], slots, self.length)
        found = self.host == self.ends[0]
        for end in self.ends[1:]:
            found = found | (self.host == end)
        return np.where(found, self._behind, self.length).min(1).tolist()

    @property
    def active_rows(self) -> list[int]:
        """`active` as numbers."""
        return self._on_host()[1]

    @property
    def left_rows(self) -> list[int]:
        """`left` as numbers."""
        return self._on_host()[0]

    def ended(self, early: bool) -> list[int]:
        """The slot of each row behind all text that was given that holds its first of `ends`, L = none; without `early`
        only if no mask is left before it."""
        _, _, masks, ends = self._on_host()
        return [end if early or end < mask else self.length for mask, end in zip(masks, ends, strict=True)]

    @property
    def active_cpu(self) -> torch.Tensor:
        """`active` on the CPU."""
        return torch.tensor(self.active_rows)

    @property
    def left_cpu(self) -> torch.Tensor:
        """int64 [batch] on the CPU, masks left in each row."""
        return torch.tensor(self.left_rows)

    @property
    def unfinished(self) -> torch.Tensor:
        """bool [batch] on the CPU, rows with a mask left or a block that is held."""
        return self.active_cpu < self.blocks

    @property
    def done(self) -> bool:
        """Whether no row has a mask left."""
        return all(block >= self.blocks for block in self.active_rows)

    def commit(
        self, slots: torch.Tensor, tokens: torch.Tensor, where: torch.Tensor, told: bool = True
    ) -> torch.Tensor | None:
        """Writes tokens into the canvas for good.

        Args:
            slots: int64 [batch, r], -1 = none.
            tokens: int64 [batch, r].
            where: bool [batch, r], which of them to write.
            told: whether somebody reads what is returned.

        Returns:
            bool [batch, L], slots that were written now; None if not `told`.
        """
        at, tokens, where = (x.cpu().numpy() for x in (slots, tokens, where))
        where = where & (at >= 0)
        rows, at = where.nonzero()[0], at[where]
        # On the host, which reads the ids after every step in any case: written there, they need not be waited for.
        # A copy, not a write in place: views handed out by `generated` keep what they showed.
        ids = self.host.copy()
        ids[rows, at] = tokens[where]
        self.ids, self._seen = torch.from_numpy(ids).to(self.ids.device), {"ids": ids}
        if not told:
            return None
        written = np.zeros(ids.shape, dtype=bool)
        written[rows, at] = True
        return torch.from_numpy(written).to(self.ids.device)

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
        self.ids, self._seen = torch.where(changed, token[:, None], self.ids), {}
        return changed

    def take_rows(self, rows: torch.Tensor) -> None:
        """Keeps rows int64 [kept] (CPU), by their present numbers; the others leave the canvas."""
        there = rows.to(self.ids.device)
        for name in ("ids", "rows", "real_start", "position_ids", "given", "tail", "first", "filled"):
            setattr(self, name, getattr(self, name)[there])
        self._held = None if self._held is None else self._held[there]
        self.real_start_cpu = self.real_start_cpu[rows]
        if self.valid is not None:
            self.valid = self.valid[there] if bool((self.real_start_cpu > 0).any()) else None
        self._behind, self.heads = None, [self.heads[row] for row in rows.tolist()]
        self._seen, self._of_blocks = {}, ([], {})

    def repeated(self, times: int) -> Canvas:
        """A canvas with each row `times` times, one behind the other."""
        copy = object.__new__(Canvas)
        copy.__dict__ = dict(self.__dict__)
        names = ("ids", "rows", "real_start", "real_start_cpu", "position_ids", "given", "tail", "first", "filled")
        for name in (*names, "valid", "_held"):
            held = getattr(self, name)
            setattr(copy, name, None if held is None else held.repeat_interleave(times, 0))
        copy._behind, copy.heads = None, [head for head in self.heads for _ in range(times)]
        copy._seen, copy._of_blocks = {}, ([], {})
        return copy
