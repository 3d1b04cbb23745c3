"""Scripts for the site tasks that carry a value from one page to another, and for those on sb-admin-2's pages."""

from __future__ import annotations

from ..sites import SITES
from .sites import button, card, event, file_menu, go, in_folder, letter, tell
from .steps import Step, click, fill, play, read

BODY = ".inbox-reader-body"


def from_mail(sender: str, pattern: str) -> tuple[Step, ...]:
    """Opens a mail and keeps what its body names."""
    return click(".inbox-item-body", sender), read(pattern, BODY)


def from_order(order: str, pattern: str, column: int) -> tuple[Step, ...]:
    """Searches the table of orders and keeps a cell."""
    row = ("#orders-rows tr", order)
    return fill(".dt-search input", order), read(pattern, f"#orders-rows td:nth-child({column})", row=row)


ON_DAY = r"April (?P<on>\d+) "
OFFICE: dict[str, tuple[Step, ...]] = {
    "memory-site-mail-calendar": (
        *from_mail("{sender}", ON_DAY),
        *go("Calendar"),
        *event("{on}", "{new}"),
        button("Create"),
    ),
    "memory-site-mail-chat": (
        *from_mail("{sender}", r"reference is (?P<ref>\w+)"),
        *go("Chat"),
        *tell("{one}", "{ref}"),
    ),
    "memory-site-mail-file": (
        *from_mail("{sender}", r"is called (?P<called>[\w-]+)"),
        *go("Files"),
        in_folder("{folder}"),
        *file_menu("{file}", "Rename"),
        fill("#rn-name", "{called}"),
        button("Save"),
    ),
    "memory-site-mail-card": (
        *from_mail("{sender}", ON_DAY),
        *go("Kanban"),
        *card("{title}", "To do", "Apr {on}"),
    ),
    "memory-site-mail-project": (
        *from_mail("{sender}", r"cost is \$(?P<cost>\d+)"),
        *go("Forms", "General"),
        fill("#projectName", "{name}"),
        fill("#budget", "{cost}"),
        click("button[type=submit]", "Create project"),
    ),
    "memory-site-mail-mail": (
        *from_mail("{sender}", r"reference is (?P<ref>\w+)"),
        *from_mail("{other}", r"is called (?P<called>[\w-]+)"),
        *letter("{to}", "{ref}", "{called}"),
    ),
    "memory-site-order-chat": (
        *from_order("{order}", r"(?P<total>\$\d+)", 4),
        *go("Chat"),
        *tell("{one}", "{total}"),
    ),
    "memory-site-order-mail": (
        *from_order("{order}", r"[A-Z][A-Z](?P<customer>.+)", 2),
        *go("Inbox"),
        *letter("{to}", "{order}", "{customer}"),
    ),
    "memory-site-contact-mail": (
        read(r"(?P<projects>\d+)Projects", ".contact-card", "{name}"),
        *go("Inbox"),
        *letter("{to}", "{title}", "{projects}"),
    ),
    "memory-site-project-card": (
        read(r"Due (?P<due>\w+ \d+)", ".project-card", "{project}"),
        *go("Kanban"),
        *card("{title}", "To do", "{due}"),
    ),
    "memory-site-card-calendar": (
        read(r"Apr (?P<on>\d+)", ".kanban-card", "{one}"),
        *go("Calendar"),
        *event("{on}", "{new}"),
        button("Create"),
    ),
    "memory-site-calendar-mail": (
        read(r"^(?P<day>\d+)", ".calendar-day:not(.muted)", "{title}"),
        *go("Inbox"),
        *letter("{to}", "{title}", "{day}"),
    ),
    "memory-site-file-chat": (
        in_folder("{folder}"),
        read(r"(?P<size>\d+ KB)", ".fm-item-meta", row=(".fm-item", "{file}")),
        *go("Chat"),
        *tell("{one}", "{size}"),
    ),
    "memory-site-price-chat": (
        read(r"(?P<price>\$\d+)", ".product-card .price", row=(".product-card", "{product}")),
        *go("Chat"),
        *tell("{one}", "{price}"),
    ),
    "memory-site-chat-settings": (
        click(".chat-conversation .name", "{one}"),
        read(r"day is (?P<word>\w+)", ".bubble"),
        *go("Settings"),
        fill("#full-name", "{word}"),
        click("#account button[type=submit]"),
    ),
    "memory-site-chat-folder": (
        click(".chat-conversation .name", "{one}"),
        read(r"day is (?P<word>\w+)", ".bubble"),
        *go("Files"),
        click(".page-actions button", "New folder"),
        fill("#nf-name", "{word}"),
        button("Create"),
    ),
    "memory-site-joined-mail": (
        read(r"(?P<joined>.+)", "#users-rows td:nth-child(6)", row=("#users-rows tr", "{name}")),
        *go("Inbox"),
        *letter("{to}", "{name}", "{joined}"),
    ),
}

SIDE = ".sidebar .nav-link"


def ticket(subject: str, message: str, priority: str = "") -> tuple[Step, ...]:
    """A ticket, from wherever one is."""
    return (
        click(SIDE, "Pages"),
        click(".collapse-item", "Support Ticket"),
        fill("#subject", subject),
        fill("#message", message),
        *((click(".custom-control-label", priority),) if priority else ()),
        click("#ticket button"),
    )


ADMIN: dict[str, tuple[Step, ...]] = {
    "site-sb-login": (
        fill("[type=email]", "{email}"),
        fill("[type=password]", "{password}"),
        click(".btn-primary", "Login"),
    ),
    "site-sb-register": (
        click("a", "Create an Account!"),
        fill("#exampleFirstName", "{first}"),
        fill("#exampleLastName", "{last}"),
        fill("#exampleInputEmail", "{email}"),
        fill("#exampleInputPassword", "{password}"),
        fill("#exampleRepeatPassword", "{password}"),
        click(".btn-primary", "Register Account"),
    ),
    "site-sb-reset": (
        click("a", "Forgot Password?"),
        fill("[type=email]", "{email}"),
        click(".btn-primary", "Reset Password"),
    ),
    "site-sb-ticket": ticket("{title}", "{text}", "{priority}"),
    "memory-site-sb-salary": (
        fill("#dataTable_filter input", "{name}"),
        read(r"(?P<salary>\$[\d,]+)", "#dataTable td:nth-child(6)", row=("#dataTable tbody tr", "{name}")),
        *ticket("{name}", "{salary}"),
    ),
    "memory-site-sb-alert": (
        click("#alertsDropdown"),
        read(r"(?P<amount>\$[\d.]+) has been deposited", ".dropdown-menu.show .dropdown-item", "deposited"),
        *ticket("{title}", "{amount}"),
    ),
    "memory-site-sb-message": (
        click("#messagesDropdown"),
        read(r"code is (?P<code>[\w-]+)", ".dropdown-menu.show .dropdown-item", "{who}"),
        *ticket("{title}", "{code}"),
    ),
    "memory-site-sb-earnings": (
        read(r"(?P<earnings>\$[\d,]+)", ".card.border-left-success"),
        *ticket("{title}", "{earnings}"),
    ),
    "memory-site-sb-oldest": (
        click("#dataTable thead th", "Age"),
        click("#dataTable thead th", "Age"),
        read(r"(?P<oldest>.+)", "#dataTable tbody tr:first-child td:first-child"),
        *ticket("{title}", "{oldest}"),
    ),
}

SCRIPTS = {name: play(SITES[name].values, *steps) for name, steps in (OFFICE | ADMIN).items()}
