"""What the page asks through alert, confirm and prompt, and who answers: a fixed policy or the agent's next action."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from playwright.sync_api import Dialog

from .boundary import forgive
from .events import URL_LENGTH, Record
from .patience import Patience
from .sheet import Sheet

Policy = Literal["accept", "dismiss", "ask"]
POLICIES: tuple[str, ...] = get_args(Policy)
MOST_DIALOGS = 20  # in one episode; more is a page that does not stop
DIALOG = "a dialog of the page waits for an answer"
_BUTTONS = {"alert": ("OK",)}


class Dialogs:
    """Answers dialogs by `policy`. With "ask" one stays open as a `sheet` until the agent has answered it; the page
    stands still so long. A page that asks whether to leave it is always left.
    """

    def __init__(self, policy: Policy, record: Record, patience: Patience, endless: Callable[[], None]) -> None:
        if policy not in POLICIES:
            raise ValueError(f"dialogs={policy!r} is not a policy; use one of {', '.join(POLICIES)}")
        self._policy = policy
        self._asks = policy == "ask"
        self.record = record
        self.sheet: Sheet | None = None
        self._patience = patience
        self._endless = endless
        self._open: Dialog | None = None
        self._count = 0

    def on_dialog(self, dialog: Dialog) -> None:
        """The page opened one."""
        said = f"{dialog.type}: {dialog.message[:URL_LENGTH]}"
        self.record.dialogs.append(said)
        self._count += 1
        if dialog.type == "beforeunload":
            self.record.tell("the page asked whether to leave it; it was left")
            forgive(dialog.accept)
        elif self._count > MOST_DIALOGS:
            forgive(dialog.dismiss)
            self._endless()
        elif self._asks:
            typed = dialog.default_value if dialog.type == "prompt" else None
            self.sheet = Sheet(dialog.message[:URL_LENGTH], _BUTTONS.get(dialog.type, ("OK", "Cancel")), typed=typed)
            self._open = dialog
            keys = "Enter answers OK" + ("" if dialog.type == "alert" else ", Escape answers Cancel")
            self.record.tell(f"the page opened a dialog, {said!r}; it waits for an answer: {keys}, or click a button")
            self._patience.give_up(DIALOG)
        else:
            self._answer(dialog, said, self._policy == "accept", dialog.default_value)

    def _answer(self, dialog: Dialog, said: str, yes: bool, text: str) -> None:
        told = "it was closed" if dialog.type == "alert" else f"the answer was {'OK' if yes else 'Cancel'}"
        with_text = f" with the text {text!r}" if yes and dialog.type == "prompt" else ""
        self.record.tell(f"the page opened a dialog, {said!r}; {told}{with_text}")
        if dialog.type == "prompt" and yes:
            forgive(lambda: dialog.accept(text))
        else:
            forgive(dialog.accept if yes else dialog.dismiss)

    def close(self) -> None:
        """Answer the open dialog as its sheet says; Cancel when nothing was chosen."""
        sheet, dialog = self.sheet, self._open
        self.sheet = self._open = None
        if sheet is not None and dialog is not None:
            said = f"{dialog.type}: {dialog.message[:URL_LENGTH]}"
            self._answer(dialog, said, sheet.reply == sheet.buttons[0], sheet.typed or "")

    def stop_asking(self) -> None:
        """The agent has finished: the open dialog and all that follow are answered with Cancel."""
        self._asks = False
        self.close()

    def forget(self) -> None:
        """A new episode: count from nothing."""
        self.stop_asking()
        self._asks = self._policy == "ask"
        self._count = 0
