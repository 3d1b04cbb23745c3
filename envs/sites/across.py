"""Tasks that need on one of gentelella's pages what another one showed, and on sb-admin-2's pages with and without that."""

from __future__ import annotations

import re
from random import Random
from typing import Any

from . import office
from .office import add_card, add_event, find, project, say, send
from .server import DASHBOARD
from .task import Site, Values
from .world import CHAT, FIRST, LAST, World, mail_address, phrase


def _mail(rng: Random, data: World) -> Values:
    """A mail and what its body names; somebody of the chat, a file, a card, an event."""
    about = office.an_event(rng, data) | office.a_file(rng, data) | office.a_mail(rng, data)
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
    return about | office.to_chat(rng, data) | {"to": mail_address(phrase(rng))}


def _contact(rng: Random, data: World) -> Values:
    name, _, _, _, projects, *_ = rng.choice(data["contacts"])
    return {"name": name, "projects": projects, "to": mail_address(phrase(rng)), "title": phrase(rng).capitalize()}


def _project(rng: Random, data: World) -> Values:
    chosen = rng.choice(data["projects"])
    return {"project": chosen[0], "due": chosen[6], "title": phrase(rng, 3).capitalize()}


def _card(rng: Random, data: World) -> Values:
    card = rng.choice(data["cards"])
    return office.an_event(rng, data) | {"one": card["title"], "on": card["due"].split()[1]}


def _event(rng: Random, data: World) -> Values:
    return office.an_event(rng, data) | {"to": mail_address(phrase(rng))}


def _file(rng: Random, data: World) -> Values:
    return office.a_file(rng, data) | office.to_chat(rng, data)


def _price(rng: Random, data: World) -> Values:
    product = rng.choice(data["products"])
    return office.to_chat(rng, data) | {"product": product[0], "price": f"${product[2]}"}


def _word(rng: Random, data: World) -> Values:
    key, name = rng.choice(list(CHAT.items()))
    return {"one": name, "word": data["chat"][str(key)][0]["text"].rstrip(".").split()[-1]}


def _folder(data: World, v: Values) -> None:
    data["files"].append({"parent": "root", "type": "folder", "name": v["word"], "starred": False})


def _joined(rng: Random, data: World) -> Values:
    user = rng.choice(data["users"][1:])
    return {"name": user["name"], "joined": user["joined"], "to": mail_address(phrase(rng))}


OFFICE: dict[str, Site] = {
    "memory-site-mail-calendar": Site(
        "inbox.html",
        "The mail from {sender} says on which day of April 2026 we meet. Add an event called '{new}' on that day to the "
        "calendar.",
        _mail,
        lambda d, v: add_event(d, office.date_of(v["on"]), v["new"]),
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
        "The mail from {sender} says on which day we meet. On the kanban board, add a card called '{title}' to the column "
        "To do with that day as its due date, written like Apr 3.",
        _mail,
        lambda d, v: add_card(d, "To do", v["title"], f"Apr {v['on']}"),
        8,
    ),
    "memory-site-mail-project": Site(
        "inbox.html",
        "The mail from {sender} names a cost. In Forms, General, create a project called '{name}' for Acme Corp with that "
        "cost as its budget.",
        _mail,
        lambda d, v: project(d, v["name"], v["cost"]),
        9,
    ),
    "memory-site-mail-mail": Site(
        "inbox.html",
        "Send a mail to {to}: its subject is the reference that the mail from {sender} names, its text is the name of the "
        "file in the mail from {other}.",
        _two,
        lambda d, v: send(d, v["to"], v["ref"], v["called"]),
        10,
    ),
    "memory-site-order-chat": Site(
        "orders.html",
        "Look up the total of order {order} and write it, like $245, to {one} in the chat.",
        _order,
        lambda d, v: say(d, v["one"], v["total"]),
        6,
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
        "Look up how many projects {name} has, and send that number alone to {to} as a mail with the subject '{title}'.",
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
        lambda d, v: add_event(d, office.date_of(v["on"]), v["new"]),
        6,
    ),
    "memory-site-calendar-mail": Site(
        "calendar.html",
        "Send a mail to {to} with the subject '{title}'. Its text is the day of April on which the event '{title}' is, as a "
        "number alone.",
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
        6,
    ),
    "memory-site-chat-settings": Site(
        "chat.html",
        "{one} wrote the word of the day in the chat. Make that word the full name of your account in the settings, and save.",
        _word,
        lambda d, v: d["settings"].update({"field:full-name": v["word"]}),
        8,
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


def _new_account(rng: Random, data: World) -> Values:
    first, last = rng.choice(FIRST), rng.choice(LAST)
    return {"first": first, "last": last, "email": mail_address(f"{first} {last}"), "password": phrase(rng, 1) + "77"}


def _register(data: World, v: Values) -> None:
    said = {"First Name": v["first"], "Last Name": v["last"], "Email Address": v["email"]}
    data["accounts"].append(said | {"Password": v["password"], "Repeat Password": v["password"]})


def _ticket(rng: Random, data: World) -> Values:
    """A ticket, somebody of the staff, and what the dashboard tells."""
    person = rng.choice(data["staff"])
    who, said = rng.choice(data["messages"])
    amount = re.search(r"\$[\d.]+\d", data["alerts"][1][1])
    assert amount is not None
    about = {"title": phrase(rng).capitalize(), "text": phrase(rng, 3), "priority": rng.choice(("Normal", "High"))}
    about |= {"name": person[0], "salary": person[5], "who": who, "code": said.rstrip(".").split()[-1]}
    return about | {"amount": amount[0], "earnings": data["figures"][1]}


def _oldest(rng: Random, data: World) -> Values:
    staff = data["staff"]
    chosen = rng.choice(staff)
    chosen[3] = 70  # nobody else is older than 66
    return _ticket(rng, data) | {"oldest": chosen[0]}


def ticket(data: World, subject: str, message: str, priority: str = "Low") -> None:
    """A ticket as the form sends it."""
    data["tickets"].append({"Subject": subject, "Message": message, "Priority": priority})


def _on_dashboard(start: str, goal: str, pick: Any, change: Any, steps: int) -> Site:
    return Site(start, goal, pick, change, steps, DASHBOARD)


ADMIN: dict[str, Site] = {
    "site-sb-login": _on_dashboard(
        "login.html",
        "Log in with the email {email} and the password {password}.",
        office.account,
        lambda d, v: d["session"].append(v["email"]),
        5,
    ),
    "site-sb-register": _on_dashboard(
        "login.html",
        "Create an account for {first} {last} with the email {email} and the password {password}.",
        _new_account,
        _register,
        12,
    ),
    "site-sb-reset": _on_dashboard(
        "login.html",
        "Ask for a new password for {email}.",
        _new_account,
        lambda d, v: d["resets"].append(v["email"]),
        4,
    ),
    "site-sb-ticket": _on_dashboard(
        "index.html",
        "Send a support ticket (under Pages) with the subject '{title}', the message '{text}' and the priority {priority}.",
        _ticket,
        lambda d, v: ticket(d, v["title"], v["text"], v["priority"]),
        8,
    ),
    "memory-site-sb-salary": _on_dashboard(
        "tables.html",
        "Send a support ticket (under Pages) with the subject '{name}' and the salary of {name} as its message.",
        _ticket,
        lambda d, v: ticket(d, v["name"], v["salary"]),
        9,
    ),
    "memory-site-sb-alert": _on_dashboard(
        "index.html",
        "One of the alerts says how much was deposited. Send a support ticket (under Pages) with the subject '{title}' and "
        "that amount, with its dollar sign, as the message.",
        _ticket,
        lambda d, v: ticket(d, v["title"], v["amount"]),
        8,
    ),
    "memory-site-sb-message": _on_dashboard(
        "index.html",
        "The message from {who} names an order code. Send a support ticket (under Pages) with the subject '{title}' and the "
        "code as its message.",
        _ticket,
        lambda d, v: ticket(d, v["title"], v["code"]),
        8,
    ),
    "memory-site-sb-earnings": _on_dashboard(
        "index.html",
        "Send a support ticket (under Pages) with the subject '{title}'. Its message is the annual earnings on the dashboard, "
        "with the dollar sign.",
        _ticket,
        lambda d, v: ticket(d, v["title"], v["earnings"]),
        7,
    ),
    "memory-site-sb-oldest": _on_dashboard(
        "tables.html",
        "Send a support ticket (under Pages) with the subject '{title}' and the name of the oldest person of the table as its "
        "message.",
        _oldest,
        lambda d, v: ticket(d, v["title"], v["oldest"]),
        9,
    ),
}
TASKS: dict[str, Site] = OFFICE | ADMIN
