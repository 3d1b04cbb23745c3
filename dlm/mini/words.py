"""The words of the arithmetic problems: who, what, where, and the verbs that add or take away. Each is one token."""

from __future__ import annotations

PEOPLE = {
    "he": "tom sam ben max leo jack adam paul".split(),
    "she": "ann mia eva lucy sara nina rosa ella".split(),
}
NAMES = tuple(name for names in PEOPLE.values() for name in names)
THINGS = tuple(
    "apples pears plums nuts eggs books pens coins cards balls cups stamps shells beads stones nails".split()
)
PLACES = tuple("bus boat train hall shop park room zoo".split())

# Present and past of the same verb stand at the same index.
GAINS = tuple("buys finds gets picks wins makes".split())
GAINED = tuple("bought found got picked won made".split())
LOSSES = tuple("sells loses uses gives drops breaks".split())
LOST = tuple("sold lost used gave dropped broke".split())
ENTERS = (("come", "in"), ("get", "on"), ("walk", "in"))
LEAVES = (("go", "out"), ("get", "off"), ("walk", "out"))

FRAME = tuple("the has had how many now more fewer people".split())
DIGITS = tuple("0123456789")
# `,` and `'` stand between the ones and the tens of a total: nothing carried, or one carried (or borrowed).
PLAIN, CARRIED = ",", "'"
FINAL = "####"
SIGNS = ("=", "+", "-", PLAIN, CARRIED, FINAL, ".", "?")


def all_words() -> list[str]:
    """Every word, digit and sign above, once, in a fixed order."""
    moves = [word for pair in (*ENTERS, *LEAVES) for word in pair]
    verbs = [*GAINS, *GAINED, *LOSSES, *LOST, *moves]
    return list(dict.fromkeys([*DIGITS, *SIGNS, *FRAME, *PEOPLE, *NAMES, *THINGS, *PLACES, *verbs]))
