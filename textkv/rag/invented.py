"""An invented world: facts that no model knows by heart, and questions of one or two of them.

`World.drawn(seed)` gives the same world for the same seed. Each fact is a chunk of its own, so that a question of two
facts needs two passages, and the second is named only by the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from textkv.rag.documents import Chunk

BUILDINGS = ("lighthouse", "library", "windmill", "theatre", "chapel", "observatory", "harbour", "castle")
CRAFTS = (
    "honey",
    "glass",
    "paper",
    "cheese",
    "bells",
    "carpets",
    "clocks",
    "pottery",
    "lace",
    "violins",
    "salt",
    "tea",
)
_FIRST = ("Ar", "Bel", "Cor", "Dal", "El", "Fen", "Gar", "Hol", "Il", "Jor", "Kel", "Lum", "Mar", "Nor", "Or", "Per")
_LAST = ("ban", "dis", "fa", "gor", "len", "mir", "na", "rik", "sa", "tam", "vel", "zo")


@dataclass(frozen=True)
class Question:
    """A question about the world.

    Attributes:
        text: the question.
        answer: the words that answer it.
        steps: the facts that it needs, as sentences, in their order.
    """

    text: str
    answer: str
    steps: tuple[str, ...]

    @property
    def hops(self) -> int:
        """Facts that it needs."""
        return len(self.steps)


@dataclass(frozen=True)
class Story:
    """One chain of facts: a building, who built it, where that person was born, and what that town is known for."""

    building: str
    town: str
    person: str
    home: str
    craft: str

    @property
    def facts(self) -> tuple[str, str, str]:
        """The three sentences."""
        return (
            f"The {self.building} of {self.town} was built by {self.person}.",
            f"{self.person} was born in {self.home}.",
            f"{self.home} is known for its {self.craft}.",
        )

    def single(self) -> Iterator[Question]:
        """Questions of one fact."""
        built, born, known = self.facts
        yield Question(f"Who built the {self.building} of {self.town}?", self.person, (built,))
        yield Question(f"In which town was {self.person} born?", self.home, (born,))
        yield Question(f"What is {self.home} known for?", self.craft, (known,))

    def double(self) -> Iterator[Question]:
        """Questions of two facts."""
        built, born, known = self.facts
        asked = f"In which town was the builder of the {self.building} of {self.town} born?"
        yield Question(asked, self.home, (built, born))
        yield Question(f"What is the town where {self.person} was born known for?", self.craft, (born, known))


@dataclass(frozen=True)
class World:
    """Stories of which no two share a name."""

    stories: tuple[Story, ...]
    seed: int

    @classmethod
    def drawn(cls, seed: int, stories: int = 16) -> World:
        """The world of a seed.

        Raises:
            ValueError: no story, or more than there are names for.
        """
        names = [first + last for first in _FIRST for last in _LAST]
        most = len(names) // 4  # a town, a home and two names of a person each
        if not 1 <= stories <= most:
            raise ValueError(f"stories={stories} lies outside 1 to {most}, as many as there are names for")
        rng = np.random.default_rng(seed)
        drawn = iter([names[n] for n in rng.permutation(len(names))])
        made = []
        for _ in range(stories):
            building, craft = (str(rng.choice(words)) for words in (BUILDINGS, CRAFTS))
            made.append(Story(building, next(drawn), f"{next(drawn)} {next(drawn)}", next(drawn), craft))
        return cls(tuple(made), seed)

    def chunks(self) -> list[Chunk]:
        """All facts, each a chunk of its own, in an order that tells nothing."""
        facts = [fact for story in self.stories for fact in story.facts]
        order = np.random.default_rng([self.seed, 1]).permutation(len(facts))
        return [Chunk(f"fact-{number:03d}.txt", 0, facts[n]) for number, n in enumerate(order)]

    def questions(self, hops: int) -> list[Question]:
        """All questions of one or two facts, in an order that tells nothing.

        Raises:
            ValueError: another number of facts.
        """
        if hops not in (1, 2):
            raise ValueError(f"hops={hops}: questions have 1 or 2")
        asked = [q for story in self.stories for q in (story.single() if hops == 1 else story.double())]
        return [asked[n] for n in np.random.default_rng([self.seed, 2]).permutation(len(asked))]
