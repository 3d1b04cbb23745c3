"""Many questions on shared screenshots in one training sequence, each seen exactly as a prompt would show it.

A sequence is a trunk (system line, screenshots, past answers) with branches: at a screenshot, every question and its
answer continue the trunk from the same position and see the trunk before them and themselves, nothing else. So a whole
episode costs one pass, and what is learned at step t is bit for bit the prompt that the agent sends at step t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from training.agent.shape import CELLS, MERGE, PATCH
from training.agent.tokenizer import MAX_NUMBER

IGNORE = -100
# side of a visual token in resized pixels
_UNIT = PATCH * MERGE


class Hint(NamedTuple):
    """While predicting the token after `query`, the place asked about is visual token `key` (indices in the
    sequence).
    """

    query: int
    key: int


class Look(NamedTuple):
    """A visual token by its screenshot (index of the turn), column and row."""

    screen: int
    column: int
    row: int


class Ask(NamedTuple):
    """One question at a screenshot: the goal text, the right answer ("Action: ..."), and the task it counts for.

    `looks`: where the words of the answer (its thought, or what it says) were shown, on this or an earlier screenshot:
    one place per token from the first word on.
    """

    goal: str
    answer: str
    task: str
    looks: tuple[Look, ...] = ()


@dataclass
class Turn:
    """One step: `image` uint8 [height, width, 3] of SCREEN's size, or None for a step that is kept as text only; `goal`
    stands beside it once it is past, in a chat that only grows.
    """

    image: np.ndarray | None
    asks: list[Ask] = field(default_factory=list)
    reply: str | None = None
    goal: str = ""


@dataclass
class Packed:
    """One sequence of S tokens: ids [S], positions [3, S] (M-RoPE), labels [S], branch [S] (0 = trunk), images, (task,
    number of tokens) per answer in order, and where to look for the answers that name a place.
    """

    ids: list[int]
    positions: np.ndarray
    labels: list[int]
    branch: list[int]
    images: list[np.ndarray]
    answers: list[tuple[str, int]]
    hints: list[Hint]


class Packer:
    """Turns lists of `Turn` into `Packed` sequences for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str) -> None:
        self.tokenizer = tokenizer
        self.image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.system = self._encode(f"<|im_start|>system\n{system}<|im_end|>\n")
        self.open_user = self._encode("<|im_start|>user\n")
        self.open_image = self._encode("<|vision_start|>")
        self.close_image = self._encode("<|vision_end|>")
        self.to_assistant = self._encode("<|im_end|>\n<|im_start|>assistant\n")
        self.open_assistant = self._encode("<|im_start|>assistant\n")
        self.end = self._encode("<|im_end|>")
        self.newline = self._encode("\n")
        self.comma = tokenizer.convert_tokens_to_ids(",")
        self.numbers = {tokenizer.convert_tokens_to_ids(str(n)): n for n in range(MAX_NUMBER + 1)}
        self._cache: dict[str, list[int]] = {}

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _text(self, text: str) -> list[int]:
        if text not in self._cache:
            if len(self._cache) > 200_000:
                self._cache.clear()
            self._cache[text] = self._encode(text)
        return self._cache[text]

    def _place(self, ids: list[int]) -> tuple[int, int, int] | None:
        """(index of x, column, row) of the first point "x,y" in visual tokens; small numbers are no pixels of a
        page.
        """
        for at in range(len(ids) - 2):
            x, y = self.numbers.get(ids[at]), self.numbers.get(ids[at + 2])
            if x is not None and y is not None and ids[at + 1] == self.comma and max(x, y) >= 12:
                return at, x // _UNIT, y // _UNIT
        return None

    def pack(self, turns: list[Turn], growing: bool = False) -> Packed:
        """Pack one episode (or one screenshot with many questions); token order is the order of the trunk.

        Args:
            growing: the goal stays beside every screenshot, as in the chat of `agentkv.persistent`; of a screenshot
                that is forgotten its place stays.
        """
        draft = _Draft()
        draft.text(self.system)
        for turn in turns:
            if turn.image is not None or growing:
                draft.text(self.open_user + self.open_image)
                draft.image(turn.image, self.image_id)
                draft.text(self.close_image)
            for ask in turn.asks:
                question, answer = self._text(ask.goal) + self.to_assistant, self._text(ask.answer) + self.end
                draft.ask(question, answer, ask.task, self._place(question), self._place(answer), ask.looks)
            if turn.reply is not None:
                if growing:
                    draft.text(self._text(turn.goal))
                draft.text(self.open_assistant if turn.image is None and not growing else self.to_assistant)
                draft.text(self._text(turn.reply) + self.end + self.newline)
        return draft.done()


class _Draft:
    """The sequence under construction; `at` is the next M-RoPE position of the trunk."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.branch: list[int] = []
        self.answers: list[tuple[str, int]] = []
        self.images: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.at = 0
        self.branches = 0
        self.hints: list[Hint] = []
        self.frames: list[int] = []

    def _add(self, ids: list[int], labels: list[int], branch: int, positions: np.ndarray) -> None:
        self.ids += ids
        self.labels += labels
        self.branch += [branch] * len(ids)
        self.positions.append(positions)

    def text(self, ids: list[int]) -> None:
        """Append tokens that carry no label; all three axes step on by one per token."""
        steps = np.tile(np.arange(self.at, self.at + len(ids)), (3, 1))
        self._add(ids, [IGNORE] * len(ids), 0, steps)
        self.at += len(ids)

    def image(self, image: np.ndarray | None, image_id: int) -> None:
        """Add a screenshot to the trunk: one placeholder per visual token, rows and columns on two M-RoPE axes; of None
        only its place.
        """
        columns, rows = CELLS
        count = rows * columns
        if image is None:
            self.at += max(rows, columns)
            return
        grid = np.stack(
            [np.zeros(count, dtype=int), np.repeat(np.arange(rows), columns), np.tile(np.arange(columns), rows)]
        )
        self.frames.append(len(self.ids))
        self._add([image_id] * count, [IGNORE] * count, 0, grid + self.at)
        self.at += max(rows, columns)
        self.images.append(image)

    def ask(
        self,
        question: list[int],
        answer: list[int],
        task: str,
        asked: tuple[int, int, int] | None,
        answered: tuple[int, int, int] | None,
        looks: tuple[Look, ...],
    ) -> None:
        """Add a branch; `asked` and `answered` are (token index, column, row) of the point that each names, if any."""
        self.branches += 1
        reply, here = len(self.ids) + len(question), len(self.frames) - 1
        if answered:
            self._hint([reply + answered[0] - 1, reply + answered[0] + 1], Look(here, *answered[1:]))
        elif asked:
            self._hint(range(reply, reply + min(3, len(answer) - 1)), Look(here, *asked[1:]))
        for number, look in enumerate(looks):
            self._hint([reply + number], look)
        # The prompt's last token looks there beforehand, as large models do of themselves: methods that choose by the
        # end of the prompt rely on it.
        for look in dict.fromkeys(looks):
            self._hint([reply - 1], look)
        ids = question + answer
        steps = np.tile(np.arange(self.at, self.at + len(ids)), (3, 1))
        self._add(ids, [IGNORE] * len(question) + answer, self.branches, steps)
        self.answers.append((task, len(answer)))

    def _hint(self, queries: Iterable[int], look: Look) -> None:
        columns, rows = CELLS
        if self.frames:
            key = self.frames[look.screen] + min(look.row, rows - 1) * columns + min(look.column, columns - 1)
            self.hints += [Hint(query, key) for query in queries]

    def done(self) -> Packed:
        """The finished sequence."""
        positions = np.concatenate(self.positions, 1)
        return Packed(self.ids, positions, self.labels, self.branch, self.images, self.answers, self.hints)


@dataclass
class Batch:
    """Padded tensors of B sequences: ids [B, S], positions [3, B, S], branch [B, S] (-1 = padding), labels [B, S]
    already shifted (labels[:, i] is what position i must say), images uint8 [N, height, width, 3], hints [K, 3] (row,
    query, key), and (task, number of labels) per answer in row order.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    branch: torch.Tensor
    labels: torch.Tensor
    images: torch.Tensor
    hints: torch.Tensor
    answers: list[tuple[str, int]]

    def visible(self) -> torch.Tensor:
        """The tree mask, bool [B, 1, S, S]: a position sees its own branch and the trunk, up to itself."""
        branch, length = self.branch, self.branch.shape[1]
        same = branch[:, :, None] == branch[:, None, :]
        trunk = (branch == 0)[:, None, :] & (branch >= 0)[:, :, None]
        return ((same | trunk) & torch.ones(length, length, dtype=torch.bool, device=branch.device).tril())[:, None]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The batch with `function` applied to every tensor."""
        changed = {f.name: function(getattr(self, f.name)) for f in fields(self) if f.name != "answers"}
        return replace(self, **changed)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory."""
        return self.map(torch.Tensor.pin_memory)


def collate(sequences: list[Packed], pad_id: int, multiple: int = 32) -> Batch:
    """Right-pad the sequences to one length, a multiple of `multiple`."""
    length = max(len(s.ids) for s in sequences)
    length = -(-length // multiple) * multiple
    count = len(sequences)
    ids = torch.full((count, length), pad_id, dtype=torch.long)
    labels = torch.full((count, length), IGNORE, dtype=torch.long)
    positions = torch.zeros((3, count, length), dtype=torch.long)
    branch = torch.full((count, length), -1, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        size = len(sequence.ids)
        ids[row, :size] = torch.tensor(sequence.ids)
        labels[row, : size - 1] = torch.tensor(sequence.labels[1:])
        positions[:, row, :size] = torch.from_numpy(sequence.positions)
        branch[row, :size] = torch.tensor(sequence.branch)
    images = torch.from_numpy(np.stack([image for s in sequences for image in s.images]))
    hints = torch.tensor([(row, *hint) for row, s in enumerate(sequences) for hint in s.hints], dtype=torch.long)
    answers = [answer for s in sequences for answer in s.answers]
    return Batch(ids, positions, branch, labels, images, hints.view(-1, 3), answers)
