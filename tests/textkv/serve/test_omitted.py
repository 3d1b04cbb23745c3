"""What a client left out of its history, on dialogues written by hand: numbers are tokens, letters pictures."""

from __future__ import annotations

import pytest
import torch

from textkv.dialogue import Dialogue, SeenImage
from textkv.serve.omitted import GoesOn, compare, restored
from textkv.serve.shelf import Held

WIDE = 3  # columns of a picture
MARKS = " ".join(["5"] * 9)  # that a template writes between turns
ANSWER = " ".join(str(n) for n in range(30, 39))


def dialogue(text: str) -> Dialogue:
    """ "1 2 A 3": a picture is three columns of the id 99."""
    ids: list[int] = []
    images = []
    for part in text.split():
        if part.isalpha():
            images.append(SeenImage(0, len(ids), len(ids) + WIDE, part.encode(), (1, 1, WIDE)))
            ids += [99] * WIDE
        else:
            ids.append(int(part))
    return Dialogue(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool), tuple(images))


def nothing(seen: Dialogue) -> torch.Tensor:
    return torch.zeros(seen.columns, dtype=torch.bool)


@pytest.mark.parametrize(
    ("seen", "told", "columns", "left_out"),
    [
        ("1 2 3", "1 2 3 4", 3, ()),
        ("1 A 2", "1 A 2 3", 5, ()),
        ("1 A 2 B 3", "1 2 B 3 4 C", 6, ((1, 4),)),
        ("1 A 2 B 3", "1 2 3 4", 3, ((1, 4), (5, 8))),
        ("1 7 A 8 5 7 B 8 6", "1 7 B 8 6 4", 7, ((2, 8),)),
    ],
)
def test_pictures_that_are_missing_are_found(seen, told, columns, left_out):
    old = dialogue(seen)
    assert compare(old, dialogue(told), nothing(old)) == GoesOn(columns, left_out)


@pytest.mark.parametrize(
    ("seen", "told"),
    [
        ("1 2 3", "1 2 3"),  # nothing new to read
        ("1 2 3", "1 3 4"),  # an edited text
        ("1 A 2", "1 B 2 3"),  # another picture
        ("1 A 2 3 4", "1 A 2 4 5"),  # a word less, and no picture
        ("1 A 2 3", "1 4"),  # nothing behind what is missing
    ],
)
def test_another_history_is_no_shorter_one(seen, told):
    old = dialogue(seen)
    found = compare(old, dialogue(told), nothing(old))
    assert found is None or found.columns < 2


@pytest.mark.parametrize(
    ("told", "reused"),
    [
        (f"1 2 {MARKS} B {ANSWER} 4", 2 + 9 + WIDE + 9),  # the first picture left out
        (f"1 2 {MARKS} C 4", 0),  # the second turn edited: only the marks of a turn are between both changes
        ("1 2 4", 0),  # both turns gone
    ],
)
def test_what_is_left_out_lies_before_the_end_of_what_was_read(told, reused):
    seen = dialogue(f"1 2 A 21 {MARKS} B {ANSWER}")
    held = Held(seen, nothing(seen), b"read", 0, "")
    assert held.continues(dialogue(told), b"another", whole=False) == reused


def test_what_was_forgotten_cannot_come_back():
    seen = dialogue("1 A 2 B 3")
    gone = nothing(seen)
    gone[1:4] = True
    assert compare(seen, dialogue("1 2 B 3 4"), gone) == GoesOn(6, ((1, 4),))
    assert compare(seen, dialogue("1 A 2 B 3 4"), gone) is None


def test_a_request_is_told_in_the_conversations_columns():
    seen, told = dialogue("1 A 2 B 3"), dialogue("1 2 B 3 4 C 5")
    found = compare(seen, told, nothing(seen))
    kinds = (told.ids == 99).int()
    inputs = {
        "input_ids": told.ids, "mm_token_type_ids": kinds, "image_grid_thw": torch.tensor([[1, 1, 3], [1, 1, 3]]),
        "pixel_values": torch.arange(6.0)[:, None], "spans": [[(2, 5), (7, 10)]],
    }  # fmt: skip
    given, moved = restored(inputs, seen, told, found)
    assert moved == 3 and given["known_images"] == 2
    assert torch.equal(given["input_ids"], torch.cat([seen.ids, told.ids[:, 6:]], 1))
    assert given["pixel_values"][:, 0].tolist() == [3, 4, 5] and len(given["image_grid_thw"]) == 3
    assert given["mm_token_type_ids"].sum() == 9 and given["spans"] == [[(5, 8), (10, 13)]]
