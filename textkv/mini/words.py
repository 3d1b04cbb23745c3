"""The words of the recall tasks: what is asked for, what is remembered, and the plain sentences in between.

Every word here is one token of the mini model's tokenizer. Keys, values and filler words do not overlap, so a key in
a prompt always belongs to a fact.
"""

from __future__ import annotations

KEYS = tuple(
    """
    falcon heron otter badger walrus lizard beetle spider turtle rabbit donkey monkey parrot pigeon salmon lobster
    oyster panther leopard tiger weasel ferret hamster gopher moose bison camel giraffe zebra hyena jackal coyote
    eagle raven sparrow robin magpie pelican ostrich penguin dolphin octopus jellyfish shrimp cricket mosquito hornet
    maple willow cedar poplar birch spruce cactus orchid tulip daisy clover thistle bamboo cotton pepper ginger garlic
    onion carrot turnip radish spinach lettuce pumpkin melon cherry apricot peach banana mango papaya lemon walnut
    almond peanut hammer chisel anvil pliers wrench shovel rake ladder bucket barrel basket kettle skillet teapot
    saucer goblet candle lantern mirror carpet curtain pillow blanket drawer cabinet closet window chimney balcony
    gutter cellar attic garage stable temple chapel castle fortress tower bridge tunnel harbor canal lagoon glacier
    volcano canyon desert prairie meadow swamp comet planet meteor galaxy saturn jupiter neptune rocket engine piston
    turbine magnet battery circuit antenna violin trumpet clarinet guitar piano cymbal tambourine banjo novel poem
    ledger stamp coin medal ribbon button zipper collar sleeve jacket sweater mitten slipper sandal helmet shield
    dagger cannon arrow saddle wagon bicycle tractor canoe ferry anchor compass sextant telescope
    """.split()
)

VALUES = tuple(
    """
    amber scarlet crimson violet indigo azure teal olive maroon ivory silver golden bronze copper purple orange yellow
    turquoise lavender beige round square oval hollow solid liquid frozen molten woolen wooden marble velvet leather
    paper rubber plastic ceramic crystal granite sandy muddy dusty rusty polished cracked twisted folded knotted braided
    woven painted carved engraved printed stamped sealed locked hidden buried floating sinking rising falling spinning
    rolling sliding bouncing shaking trembling humming buzzing ringing singing shouting sleeping waking dreaming
    laughing crying smiling frowning hungry thirsty sleepy lazy busy clever foolish honest humble proud jealous
    generous greedy gentle fierce brave timid noble royal rural urban foreign ancient modern future early final
    bitter salty sour spicy sweet fresh stale crispy creamy sticky slippery smooth rough
    """.split()
)

THINGS = tuple(
    """
    apple bread butter cheese honey sugar flour cream pasta soup salad pizza cookie candy juice coffee cocoa water
    table chair couch shelf clock phone radio camera pencil crayon marker eraser ruler folder envelope packet parcel
    bottle carton crate sack tray spoon fork knife plate bowl cup mug glass jar lid shirt skirt dress scarf glove
    sock boot belt hat cap coat vest ring necklace bracelet wallet purse watch brush comb soap towel sponge razor
    doctor lawyer pilot sailor soldier farmer baker butcher tailor barber painter singer dancer actor writer
    """.split()
)

NUMBERS = tuple(str(number) for number in range(10, 100))

# Words of the facts and questions themselves.
FRAME = ("the", "code", "list", "of", "is", "question", ":", ".")

# Filler sentences: each slot takes one word of its class; lower-case words stand for themselves.
CLASSES = {
    "PERSON": """man woman child boy girl king queen friend neighbour stranger teacher student brother sister uncle
    aunt cousin guest host traveller""".split(),
    "PLACE": """river forest village city house garden road field hill valley market school church station shore
    island kitchen corner library street""".split(),
    "QUALITY": "old young tall small quiet happy sad tired rich poor kind strange cold warm dark bright long".split(),
    "MOVED": "walked went came ran travelled returned wandered hurried".split(),
    "DID": "saw met heard followed helped called remembered found left asked".split(),
    "WHEN": "today yesterday again once often always never soon later now".split(),
    "WHERE": "to from near behind beyond across past towards".split(),
}
PATTERNS = tuple(
    pattern.split()
    for pattern in (
        "the PERSON MOVED WHERE the PLACE .",
        "the QUALITY PERSON MOVED WHERE the QUALITY PLACE WHEN .",
        "a QUALITY PERSON DID the PERSON in the PLACE .",
        "WHEN the PERSON DID a PERSON and MOVED WHERE the PLACE .",
        "it was a QUALITY day in the PLACE .",
        "the PLACE was QUALITY and the PERSON was QUALITY .",
        "nobody DID the QUALITY PERSON WHEN .",
        "WHERE the PLACE the PERSON DID a QUALITY PERSON .",
        "they MOVED WHERE the PLACE but the PERSON DID nobody .",
        "she said that the PLACE was QUALITY WHEN .",
    )
)


def all_words() -> list[str]:
    """Every word above, once, in a fixed order."""
    plain = [word for pattern in PATTERNS for word in pattern if word not in CLASSES]
    classes = [word for words in CLASSES.values() for word in words]
    return list(dict.fromkeys([*FRAME, *KEYS, *VALUES, *THINGS, *NUMBERS, *plain, *classes]))
