"""Teams: agents of one model in a directed graph, each reading what is shared and the answers of those before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Literal

from transformers import PreTrainedTokenizerBase

from textkv.reuse.chat import chat
from textkv.reuse.kvcomm.engine import Call, Dense
from textkv.reuse.kvcomm.template import Segment
from textkv.reuse.pictures import Picture

Layout = Literal["role", "shared"]


class Team:
    """Agents and who reads whose answer.

    Args:
        engine: how prompts are read.
        roles: what each agent is told that it is, by its name (lower-case letters, digits, underscores).
        edges: (from, to): the second reads the first one's answer. No circles.
        shared: names of the texts that all agents read, in this order.
        layout: what a prompt begins with: the "role" (as is usual), or what is "shared" (so that plain prefix reuse
            serves all agents).
        begun: how every answer begins.

    Attributes:
        order: the agents, each behind those that it reads.

    Raises:
        ValueError: a circle, an edge of an unknown agent, or a name that no placeholder may have.
    """

    def __init__(
        self,
        engine: Dense,
        roles: Mapping[str, str],
        edges: Sequence[tuple[str, str]],
        *,
        shared: Sequence[str] = ("document", "question"),
        layout: Layout = "role",
        begun: str = "",
    ) -> None:
        if not roles:
            raise ValueError("a team needs at least 1 agent")
        unknown = next((name for edge in edges for name in edge if name not in roles), None)
        if unknown is not None:
            raise ValueError(f"edge with unknown agent {unknown!r}; there are {', '.join(roles)}")
        twice = next((name for name in roles if name in shared), None)
        if twice is not None:
            raise ValueError(f"agent {twice!r} has the name of a shared text; name one of them otherwise")
        self.engine, self.shared = engine, tuple(shared)
        # An edge that is told twice is one.
        self._reads = {name: tuple(dict.fromkeys(a for a, b in edges if b == name)) for name in roles}
        try:
            self.order = tuple(TopologicalSorter(self._reads).static_order())
        except CycleError as error:
            raise ValueError(
                f"agents read each other in a circle: {' -> '.join(error.args[1])}; drop an edge"
            ) from None
        for name in self.order:
            text = prompt_text(engine.tokenizer, roles[name], self.shared, self._reads[name], layout) + begun
            engine.add(name, text)
            wanted, found = {*self.shared, *self._reads[name]}, engine.templates[name].names
            if set(found) != wanted:
                odd = sorted(wanted ^ set(found))[0]
                raise ValueError(
                    f"agent {name!r}: {odd!r} cannot be told from text in its prompt; names have lower-case letters, "
                    "digits and underscores, and roles no {name} in braces"
                )

    @classmethod
    def chain(cls, engine: Dense, roles: Mapping[str, str], **options) -> Team:
        """Each agent reads the one before it."""
        names = list(roles)
        return cls(engine, roles, list(zip(names, names[1:], strict=False)), **options)

    @classmethod
    def star(cls, engine: Dense, roles: Mapping[str, str], **options) -> Team:
        """The last agent reads all others, which read none."""
        names = list(roles)
        return cls(engine, roles, [(leaf, names[-1]) for leaf in names[:-1]], **options)

    @classmethod
    def full(cls, engine: Dense, roles: Mapping[str, str], **options) -> Team:
        """Each agent reads all before it."""
        names = list(roles)
        return cls(engine, roles, [(a, b) for number, b in enumerate(names) for a in names[:number]], **options)

    def run(self, given: Mapping[str, str | Picture]) -> list[Call]:
        """One request: the calls in `order`, the last of which is the team's answer.

        Args:
            given: a text for each shared name, or a picture (`textkv.reuse.kvcomm.picture`).

        Raises:
            ValueError: a shared text is missing, or one is not shared.
        """
        wrong = sorted(set(self.shared) ^ set(given))
        if wrong:
            raise ValueError(f"the team shares {', '.join(self.shared) or 'nothing'}; check {wrong[0]!r}")
        texts: dict[str, Segment] = {name: self.engine.segment(given[name]) for name in self.shared}
        calls = []
        for name in self.order:
            wanted = {x: texts[x] for x in (*self.shared, *self._reads[name])}
            calls.append(self.engine.call(name, wanted))
            texts[name] = calls[-1].answer
        return calls


def prompt_text(
    tokenizer: PreTrainedTokenizerBase, role: str, shared: Sequence[str], reads: Sequence[str], layout: Layout = "role"
) -> str:
    """The template of an agent, in the chat format of its tokenizer where it has one.

    Raises:
        ValueError: an unknown layout.
    """
    if layout not in ("role", "shared"):
        raise ValueError(f"layout={layout!r}: use 'role' or 'shared'")
    texts = "".join(f"{name.capitalize()}:\n{{{name}}}\n\n" for name in shared)
    answers = "".join(f"Answer of {name}: {{{name}}}\n" for name in reads)
    if layout == "shared":
        return chat(tokenizer, None, f"{texts}{role}\n{answers}")
    return chat(tokenizer, role, texts + answers)
