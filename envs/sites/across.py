"""Tasks that need on one of gentelella's pages what another one showed."""

from __future__ import annotations

import re
from random import Random

from . import messages, planning, workspace
from .messages import say, send
from .planning import add_card, add_event
from .task import Site, Values, find
from .workspace import project
from .world import CHAT, World, mail_address, phrase


def _mail(rng: Random, data: World) -> Values:
    """A mail and what its body names; somebody of the chat, a file, a card, an event."""
    about = planning.an_event(rng, data) | workspace.a_file(rng, data) | messages.a_mail(rng, data)
    body = find(data["mail"], subject=about["subject"])["body"]
    shown = re.search(r"is (?P<ref>\w+)\..*April (?P<on>\d+) .*\$(?P<cost>\d+).*called (?P<called>\S+)\.", body, re.S)
    assert shown is not None
    name = phrase(rng).title()
    return about | shown.groupdict() | {"one": rng.choice(list(CHAT.values())), "name": name}


def _two(rng: Random, data: World) -> Values:
    first = second = _mail(rng, data)
    while second["sender"] == first["sender"]:
        second = _mail(rng, data)
    return first | {"other": second["sender"], "called": second["called"]}


def _order(rng: Random, data: World) -> Values:
    order = rng.choice(data["orders"])
    about = {"order": order["id"], "total": f"${order['total']}", "customer": order["customer"]}
    return about | messages.to_chat(rng, data) | {"to": mail_address(phrase(rng))}


def _contact(rng: Random, data: World) -> Values:
    name, _, _, _, projects, *_ = rng.choice(data["contacts"])
    return {"name": name, "projects": projects, "to": mail_address(phrase(rng)), "title": phrase(rng).capitalize()}


def _project(rng: Random, data: World) -> Values:
    chosen = rng.choice(data["projects"])
    return {"project": chosen[0], "due": chosen[6], "title": phrase(rng, 3).capitalize()}


def _card(rng: Random, data: World) -> Values:
    card = rng.choice(data["cards"])
    return planning.an_event(rng, data) | {"one": card["title"], "on": card["due"].split()[1]}


def _event(rng: Random, data: World) -> Values:
    return planning.an_event(rng, data) | {"to": mail_address(phrase(rng))}


def _file(rng: Random, data: World) -> Values:
    return workspace.a_file(rng, data) | messages.to_chat(rng, data)


def _price(rng: Random, data: World) -> Values:
    product = rng.choice(data["products"])
    return messages.to_chat(rng, data) | {"product": product[0], "price": f"${product[2]}"}


def _word(rng: Random, data: World) -> Values:
    key, name = rng.choice(list(CHAT.items()))
    return {"one": name, "word": data["chat"][str(key)][0]["text"].rstrip(".").split()[-1]}


def _folder(data: World, v: Values) -> None:
    data["files"].append({"parent": "root", "type": "folder", "name": v["word"], "starred": False})


def _joined(rng: Random, data: World) -> Values:
    user = rng.choice(data["users"][1:])
    return {"name": user["name"], "joined": user["joined"], "to": mail_address(phrase(rng))}


TASKS: dict[str, Site] = {
    "memory-site-mail-calendar": Site(
        "inbox.html",
        "The mail from {sender} says on which day of April 2026 we meet. Add an event called '{new}' to the "
        "calendar, on that day.",
        _mail,
        lambda d, v: add_event(d, planning.date_of(v["on"]), v["new"]),
        7,
    ),
    "memory-site-mail-chat": Site(
        "inbox.html",
        "The mail from {sender} names a reference. Write the reference alone to {one} in the chat.",
        _mail,
        lambda d, v: say(d, v["one"], v["ref"]),
        6,
    ),
    "memory-site-mail-file": Site(
        "inbox.html",
        "The mail from {sender} says how a file is called. In Files, rename '{file}' in the folder {folder} like that.",
        _mail,
        lambda d, v: find(d["files"], name=v["file"]).update(name=v["called"]),
        8,
    ),
    "memory-site-mail-card": Site(
        "inbox.html",
        "The mail from {sender} says on which day we meet. On the kanban board, add a card called '{title}' to the "
        "column To do with that day as its due date, written like Apr 3.",
        _mail,
        lambda d, v: add_card(d, "To do", v["title"], f"Apr {v['on']}"),
        8,
    ),
    "memory-site-mail-project": Site(
        "inbox.html",
        "The mail from {sender} names a cost. In Forms, General, create a project called '{name}' for Acme Corp with "
        "that cost as its budget.",
        _mail,
        lambda d, v: project(d, v["name"], v["cost"]),
        9,
    ),
    "memory-site-mail-mail": Site(
        "inbox.html",
        "Send a mail to {to}: its subject is the reference that the mail from {sender} names, its text is the name of "
        "the file in the mail from {other}.",
        _two,
        lambda d, v: send(d, v["to"], v["ref"], v["called"]),
        10,
    ),
    "memory-site-order-chat": Site(
        "orders.html",
        "Look up the total of order {order} and write it, like $245, to {one} in the chat.",
        _order,
        lambda d, v: say(d, v["one"], v["total"]),
        7,
    ),
    "memory-site-order-mail": Site(
        "orders.html",
        "Send a mail to {to} with the subject '{order}' and the name of that order's customer as its text.",
        _order,
        lambda d, v: send(d, v["to"], v["order"], v["customer"]),
        11,
    ),
    "memory-site-contact-mail": Site(
        "contacts.html",
        "Look up how many projects {name} has, and send that number alone to {to} as a mail with the subject "
        "'{title}'.",
        _contact,
        lambda d, v: send(d, v["to"], v["title"], v["projects"]),
        9,
    ),
    "memory-site-project-card": Site(
        "projects.html",
        "On the kanban board, add a card called '{title}' to the column To do. Its due date is that of the project "
        "'{project}', written like Apr 3.",
        _project,
        lambda d, v: add_card(d, "To do", v["title"], v["due"]),
        7,
    ),
    "memory-site-card-calendar": Site(
        "kanban.html",
        "Add an event called '{new}' to the calendar, on the day on which the card '{one}' is due.",
        _card,
        lambda d, v: add_event(d, planning.date_of(v["on"]), v["new"]),
        6,
    ),
    "memory-site-calendar-mail": Site(
        "calendar.html",
        "Send a mail to {to} with the subject '{title}'. Its text is the day of April of the event '{title}', as "
        "a number alone.",
        _event,
        lambda d, v: send(d, v["to"], v["title"], v["day"]),
        9,
    ),
    "memory-site-file-chat": Site(
        "file_manager.html",
        "Look up the size of the file '{file}' in the folder {folder} and write it, like 120 KB, to {one} in the chat.",
        _file,
        lambda d, v: say(d, v["one"], v["size"]),
        6,
    ),
    "memory-site-price-chat": Site(
        "e_commerce.html",
        "Look up what the product '{product}' costs and write the price, like $49, to {one} in the chat.",
        _price,
        lambda d, v: say(d, v["one"], v["price"]),
        7,
    ),
    "memory-site-chat-settings": Site(
        "chat.html",
        "{one} wrote the word of the day in the chat. Make that word the full name of your account in the settings, "
        "and save.",
        _word,
        lambda d, v: d["settings"].update({"field:full-name": v["word"]}),
        7,
    ),
    "memory-site-chat-folder": Site(
        "chat.html",
        "{one} wrote the word of the day in the chat. In Files, make a new folder in My Drive that is called like it.",
        _word,
        _folder,
        6,
    ),
    "memory-site-joined-mail": Site(
        "user_management.html",
        "Send a mail to {to} with the subject '{name}'. Its text says when {name} joined the workspace, like May 2024.",
        _joined,
        lambda d, v: send(d, v["to"], v["name"], v["joined"]),
        9,
    ),
}
