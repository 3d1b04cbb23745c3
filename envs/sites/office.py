"""Tasks on one part of gentelella's pages: mail, calendar, board, files, chat, people, settings, forms, shop."""

from __future__ import annotations

from random import Random
from typing import Any

from .task import Site, Values
from .world import CHAT, NAMES, SENDERS, TITLES, World, mail, mail_address, phrase

COLUMNS = {"To do": "todo", "In progress": "doing", "Review": "review", "Done": "done"}


def find(entries: list[dict[str, Any]], **wanted: object) -> dict[str, Any]:
    """The first entry with these values."""
    return next(entry for entry in entries if all(entry[name] == value for name, value in wanted.items()))


def a_mail(rng: Random, data: World) -> Values:
    """A mail of the inbox: sender, subject, address; and a text to write."""
    chosen = rng.choice([entry for entry in data["mail"] if entry["folder"] == "inbox" and not entry["trashed"]])
    about = {"sender": chosen["from"], "subject": chosen["subject"], "address": chosen["fromEmail"]}
    return about | {"text": phrase(rng, 3), "to": mail_address(rng.choice(SENDERS)), "title": phrase(rng).capitalize()}


def two_mails(rng: Random, data: World) -> Values:
    """The subjects of two mails without a star."""
    plain = [entry["subject"] for entry in data["mail"] if entry["folder"] == "inbox"
             and not entry["trashed"] and not entry["starred"]]  # fmt: skip
    one, other = rng.sample(plain, 2)
    return {"one": one, "other": other}


def _binned(rng: Random, data: World) -> Values:
    return {"subject": rng.choice([entry["subject"] for entry in data["mail"] if entry["trashed"]])}


def _draft(rng: Random, data: World) -> Values:
    draft = find(data["mail"], folder="drafts")
    return {"subject": draft["subject"], "to": draft["to"], "text": phrase(rng, 3)}


def _star(data: World, v: Values) -> None:
    for subject in (v["one"], v["other"]):
        find(data["mail"], subject=subject)["starred"] = True


def send(data: World, to: str, subject: str, body: str) -> None:
    """A mail that was sent."""
    data["mail"].append(mail("sent", to=to, subject=subject, body=body))


MAIL = {
    "site-mail-send": Site(
        "inbox.html",
        "Send a mail to {to} with the subject '{title}' and the text '{text}'.",
        a_mail,
        lambda d, v: send(d, v["to"], v["title"], v["text"]),
        8,
    ),
    "site-mail-reply": Site(
        "inbox.html",
        "Reply to the mail '{subject}' from {sender}. Write '{text}' above the quoted text and send it.",
        a_mail,
        lambda d, v: send(d, v["address"], f"Re: {v['subject']}", v["text"]),
        6,
    ),
    "site-mail-forward": Site(
        "calendar.html",
        "Forward the mail '{subject}' from {sender} to {to}, without a text of your own.",
        a_mail,
        lambda d, v: send(d, v["to"], f"Fwd: {v['subject']}", ""),
        6,
    ),
    "site-mail-trash": Site(
        "kanban.html",
        "Move the mail '{subject}' from {sender} to the trash.",
        a_mail,
        lambda d, v: find(d["mail"], subject=v["subject"]).update(trashed=True),
        3,
    ),
    "site-mail-restore": Site(
        "chat.html",
        "Take the mail '{subject}' out of the trash.",
        _binned,
        lambda d, v: find(d["mail"], subject=v["subject"]).update(trashed=False),
        4,
    ),
    "site-mail-star": Site(
        "index.html", "In the inbox, give a star to the mails '{one}' and '{other}'.", two_mails, _star, 3
    ),
    "site-mail-draft": Site(
        "inbox.html",
        "Finish the draft '{subject}': write the text '{text}' and send it.",
        _draft,
        lambda d, v: find(d["mail"], folder="drafts").update(folder="sent", body=v["text"]),
        6,
    ),
    "site-mail-save": Site(
        "inbox.html",
        "Write a mail to {to} with the subject '{title}', and save it as a draft without sending it.",
        a_mail,
        lambda d, v: d["mail"].append(mail("drafts", to=v["to"], subject=v["title"])),
        6,
    ),
}


def date_of(day: str | int, month: int = 4) -> str:
    """The key of a day of 2026 in the calendar's data."""
    return f"2026-{month:02}-{int(day):02}"


def add_event(data: World, date: str, title: str, color: str = "") -> None:
    """An event on a day that may have some."""
    data["events"].setdefault(date, []).append({"title": title, "color": color})


def an_event(rng: Random, data: World) -> Values:
    """An event that is there, another title for it, and a free day."""
    key = rng.choice(list(data["events"]))
    free = rng.choice([day for day in range(1, 31) if date_of(day) not in data["events"]])
    about = {"title": data["events"][key][0]["title"], "day": str(int(key[-2:])), "free": str(free)}
    new = rng.choice([title for title in TITLES if title != about["title"]])
    return about | {"new": f"{new} {rng.randint(2, 99)}", "color": rng.choice(("Blue", "Yellow", "Red", "Purple"))}


def _move(data: World, v: Values) -> None:
    data["events"][date_of(v["free"])] = data["events"].pop(date_of(v["day"]))


CALENDAR = {
    "site-calendar-add": Site(
        "calendar.html",
        "Add an event called '{new}' on April {free}, 2026.",
        an_event,
        lambda d, v: add_event(d, date_of(v["free"]), v["new"]),
        4,
    ),
    "site-calendar-colour": Site(
        "index.html",
        "Add an event called '{new}' on May {free}, 2026 to the calendar, in {color}.",
        an_event,
        lambda d, v: add_event(d, date_of(v["free"], 5), v["new"], v["color"].lower()),
        7,
    ),
    "site-calendar-rename": Site(
        "calendar.html",
        "Rename the event '{title}' in April 2026 to '{new}'.",
        an_event,
        lambda d, v: d["events"][date_of(v["day"])][0].update(title=v["new"]),
        4,
    ),
    "site-calendar-delete": Site(
        "inbox.html",
        "Delete the event '{title}' from the calendar of April 2026.",
        an_event,
        lambda d, v: d["events"].pop(date_of(v["day"])),
        3,
    ),
    "site-calendar-move": Site(
        "calendar.html", "Move the event '{title}' from April {day} to April {free}, 2026.", an_event, _move, 4
    ),
}


def a_card(rng: Random, data: World) -> Values:
    """Two cards, columns where they are not, a person, a new title."""
    one, other = rng.sample([card for card in data["cards"] if card["col"] in ("todo", "doing")], 2)
    column = rng.choice(("Review", "Done"))
    name = rng.choice([name for name in NAMES if _initials(name) not in one["assignees"]])
    about = {"one": one["title"], "other": other["title"], "column": column, "name": name}
    due = f"May {rng.randint(1, 28)}"
    priority = rng.choice([kind for kind in ("Low", "Medium", "High") if kind.lower() != one["priority"]])
    return about | {"title": phrase(rng, 3).capitalize(), "due": due, "priority": priority}


def _initials(name: str) -> str:
    return "".join(part[0] for part in name.split())


def add_card(data: World, column: str, title: str, due: str = "") -> None:
    """A new card as the board's editor makes it."""
    card = {"col": COLUMNS[column], "title": title, "desc": "", "labels": [], "assignees": []}
    data["cards"].append(card | {"due": due, "priority": "medium"})


def _move_cards(data: World, v: Values) -> None:
    for title in (v["one"], v["other"]):
        find(data["cards"], title=title)["col"] = COLUMNS[v["column"]]


BOARD = {
    "site-board-move": Site(
        "inbox.html", "On the kanban board, move the cards '{one}' and '{other}' to {column}.", a_card, _move_cards, 3
    ),
    "site-board-add": Site(
        "kanban.html",
        "Add a card called '{title}' to the column {column}, due {due}.",
        a_card,
        lambda d, v: add_card(d, v["column"], v["title"], v["due"]),
        6,
    ),
    "site-board-assign": Site(
        "kanban.html",
        "Also assign {name} to the card '{one}'.",
        a_card,
        lambda d, v: find(d["cards"], title=v["one"])["assignees"].append(_initials(v["name"])),
        3,
    ),
    "site-board-edit": Site(
        "chat.html",
        "On the kanban board, rename the card '{one}' to '{title}' and make its due date {due}.",
        a_card,
        lambda d, v: find(d["cards"], title=v["one"]).update(title=v["title"], due=v["due"]),
        7,
    ),
    "site-board-delete": Site(
        "calendar.html",
        "Delete the card '{one}' from the kanban board.",
        a_card,
        lambda d, v: d["cards"].remove(find(d["cards"], title=v["one"])),
        3,
    ),
    "site-board-priority": Site(
        "kanban.html",
        "Set the priority of the card '{one}' to {priority}.",
        a_card,
        lambda d, v: find(d["cards"], title=v["one"]).update(priority=v["priority"].lower()),
        4,
    ),
}

FOLDERS = {"Projects": "projects", "Design": "design", "Engineering": "eng", "Marketing": "marketing"}


def a_file(rng: Random, data: World) -> Values:
    """A file, its folder, its size and a new name."""
    folder = rng.choice(tuple(FOLDERS))
    chosen = rng.choice([f for f in data["files"] if f["parent"] == FOLDERS[folder] and f["type"] != "folder"])
    new = f"{phrase(rng, 1)} {rng.randint(10, 99)}"
    return {"file": chosen["name"], "folder": folder, "size": chosen["size"], "new": new}


FILES = {
    "site-files-rename": Site(
        "file_manager.html",
        "Rename the file '{file}' in the folder {folder} to '{new}'.",
        a_file,
        lambda d, v: find(d["files"], name=v["file"]).update(name=v["new"]),
        6,
    ),
    "site-files-folder": Site(
        "inbox.html",
        "In Files, make a new folder called '{new}' in the folder {folder}.",
        a_file,
        lambda d, v: d["files"].append(
            {"parent": FOLDERS[v["folder"]], "type": "folder", "name": v["new"], "starred": False}
        ),
        6,
    ),
    "site-files-delete": Site(
        "file_manager.html",
        "Delete the file '{file}' from the folder {folder}.",
        a_file,
        lambda d, v: d["files"].remove(find(d["files"], name=v["file"])),
        3,
    ),
    "site-files-star": Site(
        "chat.html",
        "In Files, mark the file '{file}' in the folder {folder} with a star.",
        a_file,
        lambda d, v: find(d["files"], name=v["file"]).update(starred=True),
        3,
    ),
}


def to_chat(rng: Random, data: World) -> Values:
    """Two people of the chat and two texts."""
    one, other = rng.sample(list(CHAT.values()), 2)
    return {"one": one, "other": other, "text": phrase(rng, 3), "more": phrase(rng, 3)}


def say(data: World, name: str, text: str) -> None:
    """What I wrote to somebody in the chat."""
    key = next(str(number) for number, known in CHAT.items() if known == name)
    data["chat"][key].append({"from": "me", "text": text})


def _say_twice(data: World, v: Values) -> None:
    say(data, v["one"], v["text"])
    say(data, v["other"], v["more"])


CHATS = {
    "site-chat-send": Site(
        "index.html",
        "In the chat, write '{text}' to {one}.",
        to_chat,
        lambda d, v: say(d, v["one"], v["text"]),
        5,
    ),
    "site-chat-two": Site(
        "chat.html", "In the chat, write '{text}' to {one} and '{more}' to {other}.", to_chat, _say_twice, 8
    ),
}


def a_user(rng: Random, data: World) -> Values:
    """Somebody of the workspace, a role that is not theirs, an address to invite."""
    user = rng.choice(data["users"][1:])
    role = rng.choice([role for role in ("Admin", "Editor", "Viewer") if role != user["role"]])
    do = "Suspend" if user["status"] == "active" else "Reactivate"
    return {"name": user["name"], "role": role, "do": do, "address": mail_address(rng.choice(SENDERS))}


def _invite(data: World, v: Values) -> None:
    data["users"].append({"email": v["address"], "role": v["role"], "status": "pending"})


USERS = {
    "site-users-role": Site(
        "inbox.html",
        "In User management, change the role of {name} to {role}.",
        a_user,
        lambda d, v: find(d["users"], name=v["name"]).update(role=v["role"]),
        3,
    ),
    "site-users-status": Site(
        "inbox.html",
        "{do} the account of {name} in User management.",
        a_user,
        lambda d, v: find(d["users"], name=v["name"]).update(
            status="suspended" if v["do"] == "Suspend" else "active"
        ),
        3,
    ),
    "site-users-invite": Site(
        "user_management.html",
        "Invite {address} to the workspace as {role}.",
        lambda rng, d: a_user(rng, d) | {"role": rng.choice(("Admin", "Viewer"))},
        _invite,
        6,
    ),
    "site-users-remove": Site(
        "inbox.html",
        "In User management, remove {name} from the workspace.",
        a_user,
        lambda d, v: d["users"].remove(find(d["users"], name=v["name"])),
        4,
    ),
}


def _two_toggles(rng: Random, data: World) -> Values:
    one, other = rng.sample([key for key in data["settings"] if key.startswith("toggle:notifications")], 2)
    say = {True: "off", False: "on"}
    found = {}
    for name, key in (("one", one), ("other", other)):
        found |= {name: key.rpartition(":")[2], f"{name}_to": say[data["settings"][key]]}
    return found


def _toggle(data: World, v: Values) -> None:
    for name in ("one", "other"):
        data["settings"][f"toggle:notifications:{v[name]}"] = v[f"{name}_to"] == "on"


def _profile(rng: Random, data: World) -> Values:
    return {"name": phrase(rng).title(), "zone": rng.choice(("London", "New York", "Los Angeles"))}


ZONES = {"London": "(UTC+00:00) London", "New York": "(UTC-05:00) New York", "Los Angeles": "(UTC-08:00) Los Angeles"}


def _integration(rng: Random, data: World) -> Values:
    key = rng.choice([key for key in data["settings"] if key.startswith("integration:")])
    return {"do": "Disconnect" if data["settings"][key] else "Connect", "service": key.partition(":")[2]}


SETTINGS = {
    "site-settings-toggles": Site(
        "settings.html",
        "Among the notification settings, turn {one_to} '{one}' and turn {other_to} '{other}'.",
        _two_toggles,
        _toggle,
        3,
    ),
    "site-settings-profile": Site(
        "settings.html",
        "Change the full name of the account to '{name}' and its timezone to {zone}, and save.",
        _profile,
        lambda d, v: d["settings"].update({"field:full-name": v["name"], "field:timezone": ZONES[v["zone"]]}),
        6,
    ),
    "site-settings-service": Site(
        "inbox.html",
        "In the settings, {do} the integration {service}.",
        _integration,
        lambda d, v: d["settings"].update({f"integration:{v['service']}": v["do"] == "Connect"}),
        4,
    ),
}


def _project(rng: Random, data: World) -> Values:
    return {"name": phrase(rng, 2).title(), "budget": str(rng.randint(10, 99) * 100), "text": phrase(rng, 3)}


def project(data: World, name: str, budget: str, **more: str) -> None:
    """A project as the form sends it."""
    fields = {"Project name": name, "Client": "Acme Corp", "Budget (USD)": budget, "Visibility": "Private"}
    data["forms"].append({"form": "New project", "fields": fields | more})


def _wizard(rng: Random, data: World) -> Values:
    first, last = rng.choice(SENDERS).split()
    about = {"first": first, "last": last, "email": mail_address(f"{first} {last}")}
    return about | {"name": phrase(rng).title(), "plan": rng.choice(("Starter", "Business"))}


PLANS = {"Starter": "Starter$0/mo", "Business": "Business$79/user/mo"}


def _workspace(data: World, v: Values) -> None:
    fields = {"First name": v["first"], "Last name": v["last"], "Email": v["email"], "Workspace name": v["name"]}
    data["forms"].append({"form": "Onboarding wizard", "fields": fields | {"Plan": PLANS[v["plan"]]}})


def account(rng: Random, data: World) -> Values:
    """The account that can sign in."""
    return dict(data["account"])


FORMS = {
    "site-form-project": Site(
        "form.html",
        "Create a project called '{name}' for Acme Corp with a budget of {budget} USD and the description '{text}'.",
        _project,
        lambda d, v: project(d, v["name"], v["budget"], Description=v["text"]),
        8,
    ),
    "site-form-wizard": Site(
        "form_wizards.html",
        "Go through the onboarding wizard: {first} {last}, email {email}, workspace '{name}', plan {plan}. "
        "Leave password and invitations empty, and finish.",
        _wizard,
        _workspace,
        13,
    ),
    "site-login": Site(
        "login.html",
        "Sign in with the email {email} and the password {password}.",
        account,
        lambda d, v: d["session"].append(v["email"]),
        5,
    ),
}


def a_product(rng: Random, data: World) -> Values:
    """A product with its choices, and who orders it."""
    names = [product[0] for product in data["products"]]
    one, other = rng.sample(names[:6], 2)
    how = {"size": rng.choice(("Medium", "Large")), "colour": rng.choice(("Green", "Red")), "count": str(rng.randint(2, 4))}
    who = {"buyer": rng.choice(SENDERS), "street": f"{phrase(rng, 1).title()} Road {rng.randint(1, 99)}"}
    return {"one": one, "other": other, "shipping": rng.choice(("Express", "Pick-up"))} | how | who


def line(name: str, size: str = "Small", colour: str = "Black", count: str | int = 1) -> dict[str, Any]:
    """A line of the cart."""
    return {"name": name, "size": size, "colour": colour, "count": int(count)}


def _order(data: World, v: Values) -> None:
    fields = {"Name": v["buyer"], "Street": v["street"], "Shipping": v["shipping"]}
    data["placed"].append({"lines": [line(v["one"], v["size"])], **fields})


SHOP = {
    "site-shop-cart": Site(
        "e_commerce.html",
        "Put {count} pieces of the product '{one}' into the cart, size {size}, colour {colour}.",
        a_product,
        lambda d, v: d["cart"].append(line(v["one"], v["size"], v["colour"], v["count"])),
        6,
    ),
    "site-shop-two": Site(
        "index.html",
        "In the storefront, put one '{one}' and one '{other}' into the cart, both in {colour}, size Small.",
        a_product,
        lambda d, v: d["cart"].extend(line(v[name], colour=v["colour"]) for name in ("one", "other")),
        8,
    ),
    "site-shop-order": Site(
        "e_commerce.html",
        "Buy one black '{one}' in size {size}: put it into the cart and place the order for {buyer}, {street}, "
        "with {shipping} shipping.",
        a_product,
        _order,
        11,
    ),
}

TASKS: dict[str, Site] = MAIL | CALENDAR | BOARD | FILES | CHATS | USERS | SETTINGS | FORMS | SHOP
