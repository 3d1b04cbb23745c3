"""Histories of which a client leaves old pictures out: they are forgotten where they lie, and nothing is read again.

Clients show a model its last few screenshots: what they send is what was read before without a picture, or without the
turns around it, and something new. A cache cannot move what came after; so the request is told to it in its own
columns: all that it has read, then what is new. What the client left out is forgotten in place: no later token sees it,
and those that came meanwhile keep what they saw of it, which a fresh prompt would not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch

from textkv.conversation import Conversation
from textkv.dialogue import Dialogue, SeenImage
from textkv.screens import Grid

AGREE = 8
"""Tokens and pictures that must be the same behind what was left out."""

Run = tuple[int, int]


@dataclass(frozen=True)
class GoesOn:
    """A request goes on from what a conversation has read.

    Attributes:
        columns: of the request, its first, that were read.
        left_out: half-open runs of columns that were read and that the request lacks, in order.
    """

    columns: int
    left_out: tuple[Run, ...] = ()


def goes_on(talk: Conversation, told: Dialogue) -> GoesOn | None:
    """How a request goes on from all that a conversation of one row has read; None if it does not, or if it has a
    picture that was forgotten.
    """
    seen = talk.seen
    return None if seen is None else compare(seen, told, talk.forgotten)


def compare(seen: Dialogue, told: Dialogue, forgotten: torch.Tensor) -> GoesOn | None:
    """See `goes_on`. forgotten: bool [columns of seen]."""
    found = _found(seen, told, forgotten)
    if found is None or found.columns >= told.columns:
        return None
    left_out = torch.zeros_like(forgotten)
    for start, end in found.left_out:
        left_out[start:end] = True
    # What was forgotten cannot be seen again.
    return None if bool((forgotten & ~left_out).any()) else found


def _found(seen: Dialogue, told: Dialogue, forgotten: torch.Tensor) -> GoesOn | None:
    common, _ = seen.common(told)
    if common == seen.columns:
        return GoesOn(common)
    if not seen.images:
        return None
    old, new = list(_parts(seen)), list(_parts(told))
    runs: list[Run] = []
    i = j = 0
    while i < len(old):
        if j < len(new) and old[i][0] == new[j][0]:
            i, j = i + 1, j + 1
            continue
        k = _again(old, new, i, j)
        if k is None:
            return None
        start, end = old[i][1], old[k][1] if k < len(old) else seen.columns
        pictures = any(isinstance(part, bytes) for part, _ in old[i:k])
        # Words alone are no history that grew too long: they were edited.
        if not pictures and not bool(forgotten[start:end].all()):
            return None
        runs.append((start, end))
        i = k
    return GoesOn(new[j][1] if j < len(new) else told.columns, tuple(runs))


def _parts(dialogue: Dialogue) -> Iterator[tuple[int | bytes, int]]:
    """Tokens, and pictures as one part each, with the column where each begins."""
    ids, at = dialogue.ids[0].tolist(), 0
    for image in dialogue.images:
        yield from ((token, at + n) for n, token in enumerate(ids[at : image.start]))
        yield image.digest, image.start
        at = image.end
    yield from ((token, at + n) for n, token in enumerate(ids[at:]))


def _again(old: list, new: list, i: int, j: int) -> int | None:
    """Where, behind old[i], the old goes on as new[j] does; None where it does not."""
    wanted = [part for part, _ in new[j : j + AGREE]]
    for k in range(i + 1, len(old)):
        have = [part for part, _ in old[k : k + AGREE]]
        # Up to the next picture: it may have been left out as well.
        have = have[: next((n for n, part in enumerate(have) if n and isinstance(part, bytes)), AGREE)]
        if have and have == wanted[: len(have)]:
            return k
    return None


def restored(inputs: dict[str, Any], seen: Dialogue, told: Dialogue, found: GoesOn) -> tuple[dict[str, Any], int]:
    """A request in the columns of the conversation that it goes on from.

    Args:
        inputs: for `Conversation.generate`, of one row.

    Returns:
        the same inputs with all that was read in front, `known_images` among them, and by how many columns what is new
        has moved.
    """
    first, moved = found.columns, seen.columns - found.columns
    ids = inputs["input_ids"]
    ids = torch.cat([seen.ids.to(ids.device), ids[:, first:]], 1)
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    out |= _shown(inputs, seen, found, moved)
    kinds, grids = inputs.get("mm_token_type_ids"), inputs.get("image_grid_thw")
    if not seen.images and grids is None:
        return out, moved
    tail = torch.zeros_like(ids[:, seen.columns :]) if kinds is None else kinds[:, first:]
    before = torch.zeros_like(ids[:, : seen.columns])
    for image in seen.images:
        before[:, image.start : image.end] = 1
    old = torch.tensor([image.grid for image in seen.images], dtype=torch.long, device=ids.device).view(-1, 3)
    new = [n for n, image in enumerate(told.images) if image.start >= first]
    fresh = grids[new] if new else old[:0]
    out |= {"mm_token_type_ids": torch.cat([before, tail.to(before)], 1), "known_images": len(seen.images)}
    out["image_grid_thw"] = torch.cat([old, fresh.to(old)])
    if new:
        # Pictures lie one behind the other, and the new ones are the last.
        patches = int(fresh.prod(1).sum())
        out["pixel_values"] = inputs["pixel_values"][-patches:]
    return out, moved


def _shown(inputs: dict[str, Any], seen: Dialogue, found: GoesOn, moved: int) -> dict[str, Any]:
    """Spans and grids of the screenshots that are still to be seen, in the conversation's columns, if they are told."""
    if "spans" not in inputs:
        return {}
    old = [image for image in seen.images if not _inside(image, found.left_out)]
    new = [n for n, (start, _) in enumerate(inputs["spans"][0]) if start >= found.columns]
    spans = [(image.start, image.end) for image in old]
    spans += [(start + moved, end + moved) for start, end in (inputs["spans"][0][n] for n in new)]
    if "grids" not in inputs:
        return {"spans": [spans]}
    return {"spans": [spans], "grids": [[_merged(image) for image in old] + [inputs["grids"][0][n] for n in new]]}


def _merged(image: SeenImage) -> Grid:
    """(rows, columns) of an image's tokens, each of which merges a square of patches."""
    _, rows, columns = image.grid
    merge = isqrt(rows * columns // (image.end - image.start))
    return rows // merge, columns // merge


def _inside(image: SeenImage, runs: tuple[Run, ...]) -> bool:
    return any(start <= image.start and image.end <= end for start, end in runs)
