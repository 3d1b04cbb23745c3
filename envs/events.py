"""What happened besides the picture, while a page ran: refusals, dialogs, files, and what the agent is told of them."""

from __future__ import annotations

from dataclasses import dataclass, field

URL_LENGTH = 300
# what the agent's own action wanted; a page's pictures, scripts and sockets are the page's affair
_AGENTS = ("navigation", "popup", "download", "upload")
_MOST_TOLD = 8


@dataclass(frozen=True)
class Blocked:
    """What the page tried and was refused; kinds: request, redirect, navigation, websocket, popup, download, upload."""

    kind: str
    url: str
    reason: str


@dataclass(frozen=True)
class Transfer:
    """A file that went into the page ("upload") or came out of it ("download"); `path` is where it lies, in bytes."""

    kind: str
    path: str
    bytes: int


@dataclass
class Record:
    """Grows while the page runs: refusals, dialogs and their answers, files, sentences for the agent's next step."""

    blocked: list[Blocked] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    files: list[Transfer] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def refuse(self, kind: str, url: str, reason: str) -> None:
        """Note a refusal, and tell the agent of it when it was about the agent's own doing."""
        self.blocked.append(Blocked(kind, url[:URL_LENGTH], reason))
        if kind in _AGENTS:
            self.tell(f"refused: {kind} {url[:URL_LENGTH]} ({reason})")

    def tell(self, sentence: str) -> None:
        """A sentence for the agent, once per step; what a page repeats without end is cut.

        Words of the page stand in it, and they must not look like the marks that divide a model's prompt.
        """
        sentence = " ".join(sentence.split()).replace("<", "\u2039").replace(">", "\u203a")
        if sentence not in self.told and len(self.told) < _MOST_TOLD:
            self.told.append(sentence)

    def clear(self) -> None:
        """Forget everything."""
        for entries in (self.blocked, self.dialogs, self.files, self.told):
            entries.clear()

    def take(self) -> tuple[list[Blocked], list[str], list[Transfer], list[str]]:
        """What was added since the last call."""
        taken = (list(self.blocked), list(self.dialogs), list(self.files), list(self.told))
        self.clear()
        return taken
