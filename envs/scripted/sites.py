"""Scripts for the site tasks on one part of gentelella's pages; each goal is read as its task's text says."""

from __future__ import annotations

from ..sites import SITES
from .steps import Step, click, corner, fill, play, press, work, write

MODAL = ".modal-backdrop.show"


def go(label: str, below: str = "") -> tuple[Step, ...]:
    """To a page by the links at the side; `below` is a link of the group `label`."""
    if below:
        return click(".nav-toggle", label), click(".nav-tree.open .nav-sublink", below)
    return (click("a.nav-link", label),)


def button(text: str) -> Step:
    """A button of the open dialog."""
    return click(f"{MODAL} .modal-footer button", text)


def open_mail(subject: str) -> Step:
    """A mail of the list."""
    return click(".inbox-item-body", subject)


def letter(to: str, subject: str, body: str, end: str = "Send") -> tuple[Step, ...]:
    """A new mail."""
    return (
        click(".page-actions button", "Compose"),
        fill("#compose-to", to),
        fill("#compose-subject", subject),
        *((fill("#compose-body", body),) if body else ()),
        button(end),
    )


MAIL: dict[str, tuple[Step, ...]] = {
    "site-mail-send": letter("{to}", "{title}", "{text}"),
    "site-mail-reply": (
        open_mail("{subject}"),
        click("[data-action=reply]"),
        corner("#compose-body"),
        press("Control", "Home"),
        write("{text}"),
        button("Send"),
    ),
    "site-mail-forward": (
        *go("Inbox"),
        open_mail("{subject}"),
        click("[data-action=forward]"),
        fill("#compose-to", "{to}"),
        button("Send"),
    ),
    "site-mail-trash": (*go("Inbox"), open_mail("{subject}"), click("[data-action=trash]")),
    "site-mail-restore": (
        *go("Inbox"),
        click(".inbox-folder", "Trash"),
        open_mail("{subject}"),
        click("[data-action=restore]"),
    ),
    "site-mail-star": (
        *go("Inbox"),
        click(".inbox-star-btn", row=(".inbox-item", "{one}")),
        click(".inbox-star-btn", row=(".inbox-item", "{other}")),
    ),
    "site-mail-draft": (
        click(".inbox-folder", "Drafts"),
        open_mail("{subject}"),
        click("[data-action=edit-draft]"),
        fill("#compose-body", "{text}"),
        button("Send"),
    ),
    "site-mail-save": letter("{to}", "{title}", "", "Save draft"),
}


def event(day: str, title: str) -> tuple[Step, ...]:
    """The dialog of a new event on a day of the month that is shown."""
    return (
        click(".calendar-day:not(.muted) .day-num", day),
        button("Add event"),
        fill("#ev-title", title),
    )


CALENDAR: dict[str, tuple[Step, ...]] = {
    "site-calendar-add": (*event("{free}", "{new}"), button("Create")),
    "site-calendar-colour": (
        *go("Calendar"),
        click(".calendar-toolbar .nav-btns button:last-child"),
        *event("{free}", "{new}"),
        click(f"{MODAL} .color-swatches label[title={{color}}]"),
        button("Create"),
    ),
    "site-calendar-rename": (click(".calendar-event", "{title}"), fill("#ev-title", "{new}"), button("Save")),
    "site-calendar-delete": (*go("Calendar"), click(".calendar-event", "{title}"), button("Delete")),
    "site-calendar-move": (
        click(".calendar-event", "{title}"),
        corner("#ev-date"),
        work(lambda known: {"typed": f"04{int(known['free']):02}2026"}),
        write("{typed}"),
        button("Save"),
    ),
}


def card(title: str, column: str, due: str = "") -> tuple[Step, ...]:
    """A new card of a column."""
    return (
        click(".kanban-add[aria-label='Add card to " + column + "']"),
        fill("#kc-title", title),
        *((fill("#kc-due", due),) if due else ()),
        button("Create"),
    )


def to_column(title: str, column: str) -> tuple[Step, ...]:
    """Moves a card by its editor: due date, priority and column follow each other."""
    tab = press("Tab")
    return click(".kanban-card-title", title), click("#kc-due"), tab, tab, write(column), button("Save")


BOARD: dict[str, tuple[Step, ...]] = {
    "site-board-move": (*go("Kanban"), *to_column("{one}", "{column}"), *to_column("{other}", "{column}")),
    "site-board-add": card("{title}", "{column}", "{due}"),
    "site-board-assign": (
        click(".kanban-card-title", "{one}"),
        click(".kanban-assignee-chip[title='{name}']"),
        button("Save"),
    ),
    "site-board-edit": (
        *go("Kanban"),
        click(".kanban-card-title", "{one}"),
        fill("#kc-title", "{title}"),
        fill("#kc-due", "{due}"),
        button("Save"),
    ),
    "site-board-delete": (*go("Kanban"), click(".kanban-card-title", "{one}"), button("Delete")),
    "site-board-priority": (
        click(".kanban-card-title", "{one}"),
        click("#kc-due"),
        press("Tab"),
        write("{priority}"),
        button("Save"),
    ),
}


def in_folder(folder: str) -> Step:
    """A folder of the tree."""
    return click(".tree-link", folder)


def file_menu(name: str, entry: str) -> tuple[Step, ...]:
    """An entry of a file's own menu."""
    return click(".fm-item-menu", row=(".fm-item", name)), click(".menu-item", entry)


FILES: dict[str, tuple[Step, ...]] = {
    "site-files-rename": (
        in_folder("{folder}"), *file_menu("{file}", "Rename"), fill("#rn-name", "{new}"), button("Save")
    ),
    "site-files-folder": (
        *go("Files"),
        in_folder("{folder}"),
        click(".page-actions button", "New folder"),
        fill("#nf-name", "{new}"),
        button("Create"),
    ),
    "site-files-delete": (in_folder("{folder}"), *file_menu("{file}", "Delete")),
    "site-files-star": (*go("Files"), in_folder("{folder}"), click(".fm-star", row=(".fm-item", "{file}"))),
}  # fmt: skip


def tell(name: str, text: str) -> tuple[Step, ...]:
    """A message in the chat."""
    return click(".chat-conversation .name", name), fill("#chat-input", text), click(".composer-send")


CHATS: dict[str, tuple[Step, ...]] = {
    "site-chat-send": (*go("Chat"), *tell("{one}", "{text}")),
    "site-chat-two": (*tell("{one}", "{text}"), *tell("{other}", "{more}")),
}


def user_menu(name: str, entry: str) -> tuple[Step, ...]:
    """An entry of a user's menu."""
    return click("[data-row-menu]", row=("#users-rows tr", name)), click(".menu-item", entry)


USERS: dict[str, tuple[Step, ...]] = {
    "site-users-role": (
        *go("User management"),
        click("[data-role-edit]", row=("#users-rows tr", "{name}")),
        click(".menu-item", "{role}"),
    ),
    "site-users-status": (*go("User management"), *user_menu("{name}", "{do}")),
    "site-users-invite": (
        click("#invite-btn"),
        fill("#iv-email", "{address}"),
        press("Tab"),
        write("{role}"),
        button("Send invite"),
    ),
    "site-users-remove": (*go("User management"), *user_menu("{name}", "Remove from workspace")),
}

SETTINGS: dict[str, tuple[Step, ...]] = {
    "site-settings-toggles": (
        click(".settings-nav a", "Notifications"),
        click(".toggle", row=(".settings-toggle-row", "{one}")),
        click(".toggle", row=(".settings-toggle-row", "{other}")),
    ),
    "site-settings-profile": (
        fill("#full-name", "{name}"),
        click("#role"),
        press("Tab"),
        work(
            lambda known: {
                "typed": {"London": "(UTC+00", "New York": "(UTC-05", "Los Angeles": "(UTC-08"}[known["zone"]]
            }
        ),
        write("{typed}"),
        click("#account button[type=submit]"),
    ),
    "site-settings-service": (*go("Settings"), click(".integration .btn", row=(".integration", "{service}"))),
}

FORMS: dict[str, tuple[Step, ...]] = {
    "site-form-project": (
        fill("#projectName", "{name}"),
        fill("#budget", "{budget}"),
        fill("#description", "{text}"),
        click("button[type=submit]", "Create project"),
    ),
    "site-form-wizard": (
        fill("[aria-label='First name']", "{first}"),
        fill("[aria-label='Last name']", "{last}"),
        fill("[aria-label='Email']", "{email}"),
        click("#next-btn"),
        fill("[aria-label='Workspace name']", "{name}"),
        click(".form-check strong", "{plan}"),
        *(click("#next-btn") for _ in range(3)),
    ),
    "site-login": (
        fill("#email", "{email}"),
        fill("#password", "{password}"),
        click("button[type=submit]"),
    ),
}


def buy(name: str, colour: str = "", size: str = "") -> tuple[Step, ...]:
    """A product of the storefront into the cart."""
    return (
        click(".product-card .name", name),
        *(click(".option-value", choice) for choice in (size, colour) if choice),
        click("#add-cart"),
    )


SHOP: dict[str, tuple[Step, ...]] = {
    "site-shop-cart": (
        click(".product-card .name", "{one}"),
        click(".option-value", "{size}"),
        click(".option-value", "{colour}"),
        fill("#qty", "{count}"),
        click("#add-cart"),
    ),
    "site-shop-two": (
        *go("Storefront"),
        *buy("{one}", "{colour}"),
        *go("Storefront"),
        *buy("{other}", "{colour}"),
    ),
    "site-shop-order": (
        *buy("{one}", size="{size}"),
        click("#cart"),
        fill("#buyer", "{buyer}"),
        fill("#street", "{street}"),
        click(".segmented span", "{shipping}"),
        click("button[type=submit]", "Place order"),
    ),
}

STEPS = MAIL | CALENDAR | BOARD | FILES | CHATS | USERS | SETTINGS | FORMS | SHOP
SCRIPTS = {name: play(SITES[name].values, *steps) for name, steps in STEPS.items()}
