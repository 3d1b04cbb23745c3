"""Words of the drawn pages and of the tokenizer: short, common, and only those that a small model needs."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

ORDINALS = ("1st", "2nd", "3rd", "4th", "5th")
SHAPES = ("circle", "square", "triangle", "rectangle", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "blue": (0, 0, 255),
    "olive": (128, 128, 0),
    "lime": (0, 255, 0),
    "green": (0, 128, 0),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "purple": (128, 0, 128),
    "orange": (255, 165, 0),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "pink": (255, 192, 203),
    "magenta": (255, 0, 255),
}
WORDS = tuple(
    "one two three four five six seven eight nine ten zero first second third last next back home start stop open "
    "close save edit send mail inbox reply print help menu file view page list item name user login logout sign "
    "password verify enter text field button box tab link word code key door room hall yes no ok cancel submit "
    "apply reset clear search find left right up down top bottom north south east west red blue green black white "
    "grey pink gold brown cat dog cow fox owl bee ant bird fish horse mouse tiger lion bear wolf frog apple pear "
    "plum lemon grape peach cherry banana orange mango melon bread milk cheese butter sugar salt water tea coffee "
    "juice cake soup rice meat egg star moon sun cloud rain snow wind storm river lake sea hill tree leaf rose "
    "lily oak pine grass stone sand gold iron silver copper glass wood paper book pen desk chair table lamp clock "
    "phone radio camera train plane boat car bus bike road bridge tower house garden school shop bank park farm "
    "king queen prince knight duke monday tuesday wednesday thursday friday saturday sunday january may june july "
    "march april circle square triangle rectangle letter number digit section account order total price ticket "
    "message friend note task done ready wait play pause music video photo game team score level city town paris "
    "rome oslo berlin london madrid vienna lorem ipsum dolor sit amet elit magna urna nunc sed velit justo risus "
    "tellus massa ".split()
)

GOALS = (
    "Click the button.",
    "Click button ONE.",
    "Click button TWO.",
    "Click button ONE, then click button TWO.",
    "Click on Tab #1.",
    'Close the dialog box by clicking the "x".',
    "Focus into the textbox.",
    "Focus into the 2nd input textbox.",
    "Click on the grid coordinate (1,-2).",
    "Click on the red colored box.",
    "Click the button that best describes the figure below.",
    'Click on a "checkbox" widget.',
    'Click on a "radio" widget.',
    'Click on a "textarea" widget.',
    'Enter "text" into the text field and press Submit.',
    'Enter the password "word" into both text fields and press submit.',
    'Enter the username "user" and the password "word" into the text fields and press login.',
    "Expand the section below and click submit.",
    "Select this and click Submit.",
    'Click on the link "word".',
    'Click on the "Submit" button.',
    "Read (1,2)",
    "Find the word.",
    "Press the button.",
    "Remember the code, then enter it on the keypad.",
    "Remember the code, then type it and press OK.",
    "Remember the colour, then click it.",
    "Remember the shapes, then click the one that changed.",
    "Remember the shapes, then click them in the order they were shown.",
    "Remember the shapes, then click the one that was shown first.",
    "What was the code?",
    "What is the code?",
    "Which figure was second?",
    "Which digit?",
    "Which colour was it?",
    "Which field had the dot?",
    "Remember where the dot is, then click that field.",
    "Which figure is third?",
    "Click on the red cross.",
    "Click on 7.",
    "Click on Next.",
    'Click on the "Next" button.',
    "Click on the shape",
    "Click on the largest",
    "Click on the previous page",
    "Tick the box",
    "Press Login.",
    "Choose the same one again",
)


def tokenizer_texts() -> list[str]:
    """Texts from which the tokenizer learns its merges: goals of the known tasks, words with and without a space,
    names.
    """
    words = [*WORDS, *COLORS, *SHAPES, *ORDINALS, *goal_words()]
    cased = [w for word in words for w in (word, word.capitalize())]
    turns = ["system\nGUI agent", "user\n", "assistant\n", "Action: ", "up", "down", "left", "right"]
    return [*GOALS] * 8 + turns * 50 + [f" {w}" for w in cased] * 2 + cased * 3


def goal_words() -> list[str]:
    """Names that the MiniWoB++ pages ask to type, read from the installed package (empty without it)."""
    spec = find_spec("miniwob")
    roots = list(spec.submodule_search_locations or []) if spec else []
    scripts = [Path(root) / "html" / "common" / "ui_utils.js" for root in roots]
    text = "".join(script.read_text(encoding="utf-8") for script in scripts if script.is_file())
    found = re.search(r"FIFTY_NAMES = \[([^\]]*)\]", text)
    return re.findall(r"'([^']+)'", found.group(1)) if found else []
