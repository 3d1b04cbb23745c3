"""Tasks with gentelella's mail and chat."""

from __future__ import annotations

from random import Random

from .task import Site, Values, find
from .world import CHAT, SENDERS, World, mail, mail_address, phrase


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

TASKS: dict[str, Site] = MAIL | CHATS
