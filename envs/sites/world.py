"""What is on the pages of an episode, drawn from its seed: mail, cards, events, files, people, orders, products.

Every list has the form that the template's own scripts use, so that the pages show it as they show their samples.
"""

from __future__ import annotations

from random import Random
from typing import Any

World = dict[str, Any]

# the staff of gentelella's pages: initials, name, colour of the picture
PEOPLE = {
    "SK": ("Sarah Kowalski", "azure"),
    "MR": ("Michael Reyes", "purple"),
    "EW": ("Emily Wang", "yellow"),
    "MK": ("Mark Kim", "red"),
    "LP": ("Lina Park", "green"),
    "DR": ("Diego Reyes", "blue"),
    "YT": ("Yuki Tanaka", "primary"),
    "TH": ("Tom Hardy", "purple"),
}
NAMES = tuple(name for name, _ in PEOPLE.values())
# the chat knows these by number
CHAT = {1: "Sarah Kowalski", 2: "Michael Reyes", 4: "Emily Wang", 5: "Diego Reyes", 6: "Mark Kim"}
SENDERS = ("Nina Volkov", "Oliver Kane", "Priya Verma", "Jamie Morales", "Rachel Chen", "Hana Mori", "Sven Dahl")
SENDERS += ("Fiona Reilly", "Ahmed Bashir", "Chris Hill", "Sarah Lee", "Robert Jones")
SUBJECTS = ("Travel plans", "Office keys", "New printer", "Budget review", "Team lunch", "Press photos", "Site visit")
SUBJECTS += ("Spring fair", "Parking space", "Annual survey", "Workshop notes", "Delivery times", "Garden party")
TITLES = (
    "Dentist",
    "Budget talk",
    "Team lunch",
    "Press call",
    "Site visit",
    "Piano lesson",
    "Board meeting",
    "Training",
)
TITLES += ("Product demo", "Tax deadline", "Interview", "Farewell party", "Photo shoot", "Audit")
CARDS = ("Order new chairs", "Translate the manual", "Fix the login page", "Plan the summer party", "Update price list")
CARDS += ("Clean up backups", "Write release notes", "Call the landlord", "Test the mobile app", "Renew certificates")
CARDS += ("Sort support tickets", "Draw a new logo", "Check the heating", "Prepare the workshop")
FILES = {"doc": ("Minutes", "Contract", "Manual", "Letter", "Agenda"), "xls": ("Budget", "Salaries", "Inventory")}
FILES |= {"pdf": ("Invoice", "Brochure", "Report", "Ticket"), "img": ("Logo", "Team", "Office", "Poster")}
ENDINGS = {"doc": "docx", "xls": "xlsx", "pdf": "pdf", "img": "png"}
PRODUCTS = (
    ("Aurora hoodie", "Apparel", "hoodie"),
    ("Linen field shirt", "Apparel", "shirt"),
    ("Trail runner sneakers", "Footwear", "sneakers"),
    ("Canvas weekend bag", "Accessories", "bag"),
    ("Wireless earbuds Pro", "Electronics", "earbuds"),
    ("Ceramic pour-over set", "Home", "pourover"),
    ("Standing desk mat", "Home", "mat"),
    ("Mechanical keyboard", "Electronics", "keyboard"),
    ("Merino base layer", "Apparel", "baselayer"),
)
WORDS = ("amber", "birch", "cobalt", "delta", "ember", "falcon", "granite", "harbor", "indigo", "juniper", "kestrel")
WORDS += ("lagoon", "maple", "nectar", "onyx", "pepper", "quartz", "raven", "saffron", "tundra", "velvet", "willow")
FIRST = ("Ada", "Bruno", "Clara", "Denis", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Katja", "Leon")
LAST = ("Berger", "Costa", "Dietz", "Eklund", "Fontaine", "Grover", "Hansen", "Ivanov", "Jansen", "Keller", "Lopez")
OFFICES = ("London", "Tokyo", "Sydney", "Edinburgh", "New York", "Singapore")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
POSITIONS = ("Accountant", "Software Engineer", "Sales Assistant", "Office Manager", "Designer", "Support Lead")


def mail_address(name: str) -> str:
    """Where somebody gets mail: "Nina Volkov" is nina.volkov@example.com."""
    return f"{name.lower().replace(' ', '.')}@example.com"


def phrase(rng: Random, words: int = 2) -> str:
    """Some words that nobody guesses."""
    return " ".join(rng.sample(WORDS, words))


def mail(folder: str, **fields: Any) -> dict[str, Any]:
    """A mail in the form of gentelella's inbox; what is not given is empty."""
    empty = {"id": "msg-0", "folder": folder, "trashed": False, "unread": False, "starred": False, "label": None}
    empty |= {"from": "Me", "fromEmail": "", "to": "", "subject": "", "preview": "", "body": "", "time": "Mon"}
    return empty | fields


def _mails(rng: Random) -> list[dict[str, Any]]:
    """Seven in the inbox; each body names a code, a day of April, an amount and a word, one per sentence."""
    found = []
    senders, subjects = rng.sample(SENDERS, 9), rng.sample(SUBJECTS, 10)
    for number in range(9):
        body = (
            f"Hello,\n\nthe reference is {rng.choice('ABCDEFGH')}{rng.randint(1000, 9999)}.\n"
            f"We meet on April {rng.randint(2, 28)} and the cost is ${rng.randint(100, 999)}.\n"
            f"The file is called {phrase(rng, 1)}-{rng.randint(10, 99)}.\n\nBest wishes\n{senders[number]}"
        )
        found.append(
            mail(
                "inbox",
                **{"from": senders[number], "fromEmail": mail_address(senders[number]), "subject": subjects[number]},
                preview="Hello,",
                body=body,
                time=("9:12 AM", "8:40 AM", "Yesterday", "Tue", "Mon")[min(number // 2, 4)],
                unread=number < 2,
                starred=number == 3,
                trashed=number >= 7,
            )
        )
    found.append(mail("drafts", to=mail_address(rng.choice(SENDERS)), subject=subjects[9], body="", time="Today"))
    return found


def _cards(rng: Random) -> list[dict[str, Any]]:
    cards = []
    for number, title in enumerate(rng.sample(CARDS, 8)):
        cards.append(
            {
                "id": number + 1,
                "col": ("todo", "doing", "review", "done")[number % 4],
                "title": title,
                "desc": "",
                "labels": [rng.choice(("design", "eng", "pm", "docs"))],
                "assignees": [rng.choice(tuple(PEOPLE))],
                "due": f"Apr {rng.randint(16, 30)}",
                "priority": rng.choice(("low", "medium", "high")),
            }
        )
    return cards


def _events(rng: Random) -> dict[str, list[dict[str, Any]]]:
    days = rng.sample(range(1, 31), 8)
    colours = ("", "blue", "yellow", "red", "purple")
    titles = rng.sample(TITLES, 8)
    return {
        f"2026-04-{day:02}": [{"id": day, "title": title, "color": rng.choice(colours)}]
        for day, title in sorted(zip(days, titles, strict=True))
    }


def _files(rng: Random) -> list[dict[str, Any]]:
    tree = (("root", "Projects"), ("root", "Marketing"), ("projects", "Design"), ("projects", "Engineering"))
    found = [{"parent": parent, "type": "folder", "name": name, "size": "—"} for parent, name in tree]
    names = [(kind, f"{name} {rng.randint(1, 9)}.{ENDINGS[kind]}") for kind, known in FILES.items() for name in known]
    rng.shuffle(names)
    for parent, count in (("root", 3), ("projects", 2), ("design", 3), ("eng", 3), ("marketing", 2)):
        for kind, name in (names.pop() for _ in range(count)):
            size = f"{rng.randint(12, 980)} KB"
            found.append({"parent": parent, "type": kind, "name": name, "size": size})
    about = {"modified": f"Apr {rng.randint(1, 14)}, 2026", "starred": False}
    return [{"id": number + 1, **entry, **about} for number, entry in enumerate(found)]


def _orders(rng: Random) -> list[dict[str, Any]]:
    orders = []
    for number in range(18):
        initials, (name, colour) = rng.choice(tuple(PEOPLE.items()))
        orders.append(
            {
                "id": f"#{7841 - number}",
                "customer": name,
                "initials": initials,
                "avatarColor": colour,
                "items": rng.randint(1, 6),
                "total": rng.randint(40, 990),
                "status": rng.choice(("paid", "processing", "pending", "cancelled")),
                "payment": rng.choice(("Visa •••• 4242", "PayPal", "Apple Pay", "Mastercard •••• 8841")),
                "createdAt": f"Apr {28 - number}, 2026",
            }
        )
    return orders


def _users(rng: Random) -> list[dict[str, Any]]:
    me = {"name": "Aigars Silkalns", "email": "aigars@example.com", "ini": "A", "col": "primary", "role": "Owner"}
    users = [me | {"status": "active", "lastActive": "just now", "joined": "Mar 2024"}]
    for initials, (name, colour) in rng.sample(tuple(PEOPLE.items()), 7):
        who = {"name": name, "email": f"{name.split()[0].lower()}@example.com", "ini": initials, "col": colour}
        users.append(
            who
            | {
                "role": rng.choice(("Admin", "Editor", "Viewer")),
                "status": rng.choice(("active", "active", "suspended")),
            }
            | {
                "lastActive": f"{rng.randint(2, 9)} hours ago",
                "joined": f"{rng.choice(MONTHS)} {rng.randint(2019, 2025)}",
            }
        )
    return users


def _settings(rng: Random) -> dict[str, Any]:
    toggles = {
        "notifications": ("Email digest", "Project updates", "@mentions", "Marketing emails", "Weekly report"),
        "privacy": ("Two-factor authentication", "Public profile", "Activity tracking"),
    }
    settings: dict[str, Any] = {
        f"toggle:{section}:{label}": rng.random() < 0.5 for section, labels in toggles.items() for label in labels
    }
    settings |= {
        f"integration:{name}": rng.random() < 0.5 for name in ("GitHub", "Slack", "Vercel", "Linear", "Notion")
    }
    settings |= {"field:full-name": "Aigars Silkalns", "field:email": "aigars@example.com"}
    return settings | {"field:role": "Administrator", "field:timezone": "(UTC+02:00) Riga"}


def office(rng: Random) -> World:
    """An episode of gentelella's pages."""
    products = [
        [name, kind, price, price + 20 if rng.random() < 0.4 else None, None, None, "4.6 (128)", slug]
        for name, kind, slug in rng.sample(PRODUCTS, 9)
        for price in [rng.randint(20, 240)]
    ]
    people = [[name, ini, col, rng.choice(("Designer", "Engineer", "Sales", "Support")), *_three(rng)]
              for ini, (name, col) in PEOPLE.items()]  # fmt: skip
    return {
        "mail": _mails(rng),
        "cards": _cards(rng),
        "events": _events(rng),
        "files": _files(rng),
        "orders": _orders(rng),
        "users": _users(rng),
        "settings": _settings(rng),
        "contacts": people,
        "projects": _projects(rng),
        "products": products,
        "chat": {str(key): [_said(f"The word of the day is {phrase(rng, 1)}.")] for key in CHAT},
        "account": {"email": mail_address(rng.choice(SENDERS)), "password": f"{phrase(rng, 1)}{rng.randint(100, 999)}"},
        **{kind: [] for kind in ("cart", "placed", "forms", "session")},
    }


def _said(text: str, who: str = "them") -> dict[str, str]:
    return {"from": who, "text": text, "time": "Today · 9:10"}


def _three(rng: Random) -> list[str]:
    return [str(number) for number in rng.sample(range(3, 99), 3)]


def _projects(rng: Random) -> list[list[Any]]:
    titles = ("Website relaunch", "Mobile app", "Warehouse move", "Help centre", "Price study", "New brand")
    states = (("On track", "green"), ("At risk", "yellow"), ("Blocked", "red"))
    found = []
    for title in titles:
        status, colour = rng.choice(states)
        client = rng.choice(("Acme Corp", "Globex Inc", "Initech", "Umbrella Co"))
        due = f"May {rng.randint(10, 30)}"
        members = rng.sample(tuple(PEOPLE), 2)
        found.append(
            [title, client, status, colour, "Planned and built by the team.", rng.randint(5, 95), due, members]
        )
    return found


def dashboard(rng: Random) -> World:
    """An episode of sb-admin-2's pages."""
    names = rng.sample([f"{first} {last}" for first in FIRST for last in LAST], 24)
    staff = [
        [name, rng.choice(POSITIONS), rng.choice(OFFICES), rng.randint(21, 66), f"20{rng.randint(10, 24)}/04/25", pay]
        for name in names
        for pay in [f"${rng.randint(60, 400)},{rng.randint(100, 999)}"]
    ]
    months = ("March", "February", "January")
    alerts = [[f"{month} {rng.randint(2, 28)}, 2026", text] for month, text in zip(months, _alerts(rng), strict=True)]
    senders = rng.sample([f"{first} {last}" for first in FIRST for last in LAST], 4)
    messages = [[who, f"The order code is {phrase(rng, 1)}-{rng.randint(10, 99)}."] for who in senders]
    figures = [f"${rng.randint(20, 90)},{rng.randint(100, 999)}", f"${rng.randint(200, 900)},{rng.randint(100, 999)}"]
    return {
        "staff": staff,
        "alerts": alerts,
        "messages": messages,
        "figures": [*figures, f"{rng.randint(20, 90)}%", str(rng.randint(11, 99))],
        "account": {"email": mail_address(rng.choice(SENDERS)), "password": f"{phrase(rng, 1)}{rng.randint(100, 999)}"},
        **{kind: [] for kind in ("session", "accounts", "resets", "tickets")},
    }


def _alerts(rng: Random) -> list[str]:
    return [
        f"The monthly report {phrase(rng, 1)}-{rng.randint(10, 99)} is ready to download!",
        f"${rng.randint(100, 999)}.{rng.randint(10, 99)} has been deposited into your account!",
        f"Spending Alert: ${rng.randint(1000, 9999)} were spent this week.",
    ]
