"""Tasks on sb-admin-2's pages, a look that no model of ours was trained on; some carry a value across pages."""

from __future__ import annotations

import re
from random import Random
from typing import Any

from .task import Site, Values
from .templates import DASHBOARD
from .workspace import account
from .world import FIRST, LAST, World, mail_address, phrase


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


TASKS: dict[str, Site] = {
    "site-sb-login": _on_dashboard(
        "login.html",
        "Log in with the email {email} and the password {password}.",
        account,
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
        "Send a support ticket (under Pages) with the subject '{title}', the message '{text}' and the "
        "priority {priority}.",
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
        "One of the alerts says how much was deposited. Send a support ticket (under Pages) with the subject '{title}' "
        "and that amount, with its dollar sign, as the message.",
        _ticket,
        lambda d, v: ticket(d, v["title"], v["amount"]),
        8,
    ),
    "memory-site-sb-message": _on_dashboard(
        "index.html",
        "A message from {who} names an order code. Send a support ticket (under Pages) with the subject '{title}' "
        "and the code as its message.",
        _ticket,
        lambda d, v: ticket(d, v["title"], v["code"]),
        8,
    ),
    "memory-site-sb-earnings": _on_dashboard(
        "index.html",
        "Send a support ticket (under Pages) with the subject '{title}'. Its message is the annual earnings on the "
        "dashboard, with the dollar sign.",
        _ticket,
        lambda d, v: ticket(d, v["title"], v["earnings"]),
        7,
    ),
    "memory-site-sb-oldest": _on_dashboard(
        "tables.html",
        "Send a support ticket (under Pages) with the subject '{title}' and the name of the oldest person in the table "
        "as its message.",
        _oldest,
        lambda d, v: ticket(d, v["title"], v["oldest"]),
        9,
    ),
}
