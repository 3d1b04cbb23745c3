"""A dialogue as a cache reads it, and what two of them have in common: ids, mask, and images by their digests."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class SeenImage:
    """The columns [start, end) of an image in its row, a digest of its patches and grid, and the grid (t, h, w)."""

    row: int
    start: int
    end: int
    digest: bytes
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class Dialogue:
    """Columns as a cache reads them: ids int64 and mask bool [batch, columns] on the CPU, images row after row.

    Made by `Conversation.dialogue`.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    images: tuple[SeenImage, ...] = ()

    @property
    def columns(self) -> int:
        """Columns that the rows have together, padding included."""
        return self.ids.shape[1]

    def first(self, columns: int) -> Dialogue:
        """The first columns alone, with the images that begin there."""
        images = tuple(x for x in self.images if x.start < columns)
        return Dialogue(self.ids[:, :columns], self.mask[:, :columns], images)

    def common(self, other: Dialogue) -> tuple[int, str]:
        """How many columns lead both dialogues in all rows, and what comes then. Both have as many rows."""
        n = min(self.columns, other.columns)
        # A mask counts as much as an id: the same tokens read with other padding have other positions.
        same = (self.ids[:, :n] == other.ids[:, :n]) & (self.mask[:, :n] == other.mask[:, :n])
        apart = (~same.all(0)).nonzero()
        n, why = (int(apart[0]), f"column {int(apart[0])} is another") if len(apart) else (n, "")
        # An image is as good as its columns, size and pixels: one that the other lacks begins the difference.
        for image in sorted(set(self.images) ^ set(other.images), key=lambda x: x.start):
            if image.start < n:
                return image.start, f"the image at column {image.start} of row {image.row} is another"
        return n, why

    def outside_images(self, columns: int) -> int:
        """`columns`, or fewer, so that no image of any row is cut in two: a model reads an image at once."""
        for image in sorted(self.images, key=lambda x: -x.end):
            if image.start < columns < image.end:
                columns = image.start
        return columns


def find_images(
    ids: torch.Tensor, pixels: torch.Tensor | None, grids: torch.Tensor | None, kinds: torch.Tensor | None,
    known: tuple[SeenImage, ...] = (),
) -> tuple[SeenImage, ...]:  # fmt: skip
    """Where the images of a batch lie and what they are, row after row as the processor gives them; `known` come
    first, and `pixels` are those of the others."""
    if pixels is None and grids is None and kinds is None:
        return ()
    if pixels is not None and (grids is None or kinds is None):
        raise ValueError("images need image_grid_thw and mm_token_type_ids, as the processor gives them")
    # Where a run of image tokens begins and ends.
    edges = F.pad((torch.zeros_like(ids) if kinds is None else kinds).cpu() == 1, (1, 1)).int().diff()
    starts, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero()[:, 1].tolist()
    patches = [] if grids is None else grids.prod(1).tolist()
    have = 0 if pixels is None else len(pixels)
    if len(starts) != len(patches) or sum(patches[len(known) :]) != have:
        raise ValueError(
            f"mm_token_type_ids marks {len(starts)} images, image_grid_thw has {len(patches)} of {sum(patches)} "
            f"patches, pixel_values {have} patches: give all three for every image of the whole dialogue, seen or "
            "not, but the pixels of known_images"
        )
    if not patches:
        return ()
    told = pixels.detach().cpu().contiguous().split(patches[len(known) :]) if have else ()
    digests = [image.digest for image in known]
    digests += [_digest(part, grid) for part, grid in zip(told, grids[len(known) :].tolist(), strict=True)]
    told = zip(starts, ends, digests, grids.tolist(), strict=True)
    return tuple(SeenImage(*start, end, digest, tuple(grid)) for start, end, digest, grid in told)


def _digest(patches: torch.Tensor, grid: list[int]) -> bytes:
    """Tells images apart: patches [n, features] on the CPU, and the grid in which they lie."""
    told = sha256(f"{grid} {patches.dtype}".encode())
    told.update(patches.view(torch.uint8).numpy())
    return told.digest()


def unseen(
    images: tuple[SeenImage, ...], columns: int, pixels: torch.Tensor | None, grids: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Pixels and grids of the images that do not lie in the first columns, for the model."""
    new = torch.tensor([image.start >= columns for image in images], dtype=torch.bool)
    if not new.any():
        return {}
    if new.all():
        return {"pixel_values": pixels, "image_grid_thw": grids}
    of_patch = new.repeat_interleave(grids.prod(1).cpu())
    return {"pixel_values": pixels[of_patch.to(pixels.device)], "image_grid_thw": grids[new.to(grids.device)]}
