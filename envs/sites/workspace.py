"""Tasks with gentelella's files, users, settings and forms."""

from __future__ import annotations

from random import Random

from .task import Site, Values, find
from .world import SENDERS, World, mail_address, phrase

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
        5,
    ),
    "site-users-status": Site(
        "inbox.html",
        "{do} the account of {name} in User management.",
        a_user,
        lambda d, v: find(d["users"], name=v["name"]).update(status="suspended" if v["do"] == "Suspend" else "active"),
        5,
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
        5,
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
        8,
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

TASKS: dict[str, Site] = FILES | USERS | SETTINGS | FORMS
