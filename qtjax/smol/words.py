"""The closed vocabularies and the small world of facts that smol's corpus and instructions are made of.

Kept small on purpose: a model of two million parameters sees every word here hundreds of times in pretraining.
"""

OPPOSITES: tuple[tuple[str, str], ...] = tuple(
    tuple(pair.split("/"))
    for pair in (
        "hot/cold big/small tall/short fast/slow old/young light/dark hard/soft wet/dry full/empty open/closed rich/poor"
        " happy/sad early/late near/far high/low thick/thin clean/dirty strong/weak loud/quiet day/night left/right"
        " front/back inside/outside good/bad true/false sweet/sour deep/shallow wide/narrow rough/smooth sharp/blunt"
        " brave/afraid alive/dead first/last up/down in/out over/under winter/summer begin/end push/pull"
        " buy/sell give/take love/hate laugh/cry win/lose come/go north/south east/west friend/enemy"
    ).split()
)

CATEGORIES: dict[str, tuple[str, ...]] = {
    kind: tuple(members.split())
    for kind, members in {
        "animal": "dog cat cow horse sheep lion tiger wolf bear mouse rabbit goat",
        "bird": "eagle owl crow swan duck hen robin sparrow parrot raven",
        "fruit": "pear plum grape banana cherry lemon peach melon fig mango",
        "tool": "hammer saw spade axe drill needle knife rake chisel wrench",
        "vehicle": "car bus train ship truck boat tram bicycle cart plane",
        "flower": "rose lily tulip daisy poppy violet orchid daffodil iris lilac",
        "metal": "iron gold silver copper tin lead zinc steel bronze nickel",
        "drink": "milk tea coffee water juice wine beer cocoa cider lemonade",
    }.items()
}

COLOURS: dict[str, tuple[str, ...]] = {
    colour: tuple(things.split())
    for colour, things in {
        "green": "grass moss clover lettuce spinach ivy parsley emerald",
        "blue": "sky sea sapphire denim bluebell lapis",
        "white": "snow milk salt sugar chalk flour paper swan",
        "black": "coal tar soot night raven ink crow pepper",
        "red": "blood ruby brick tomato cherry fire rust poppy",
        "yellow": "butter lemon banana corn gold canary sunflower honey",
        "brown": "mud coffee cocoa chocolate wood toast leather bread",
        "grey": "ash lead smoke steel fog stone elephant mouse",
    }.items()
}

DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
MONTHS = tuple("January February March April May June July August September October November December".split())
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
NUMBERS = tuple(str(n) for n in range(1, 41))

NAMES = tuple("Ana Tom Mia Sam Eva Max Leo Zoe Ida Ben Lena Paul Nora Hugo Rosa Karl Amy Jack Lucy Fred Emma Otto Ruth Dan".split())
GOODS = tuple("pears plums cups books coins hats eggs keys balls stones apples cards pens shells boxes rings".split())
OBJECTS = tuple("cup book coin hat egg key ball stone apple card pen shell lamp ring spoon clock".split())
PLACES = tuple("box bag basket drawer room garden kitchen house barn shop car hall".split())
WORDS = tuple(
    (
        "moon cup tree river lamp stone cloud bread door hill star fish wind road snow leaf glass bell rope sand"
        " field bridge candle window mirror paper button ladder pocket garden forest island pillow basket hammer"
        " castle feather blanket market tower"
    ).split()
)

FILLERS = (
    "That is a nice question.",
    "It is raining a little today.",
    "I like to walk in the garden.",
    "Many people ask about this.",
    "The kitchen is warm in winter.",
    "We had bread and milk for lunch.",
    "Some things are easy to say.",
    "My clock is on the wall.",
    "There is a bridge over the river.",
    "I hope you are well.",
    "The wind was strong last night.",
    "A book is a good friend.",
    "Let me think about it for a moment.",
    "The train was late again.",
    "You can read more in a book.",
    "Have a lovely day.",
    "The market opens early.",
    "It is good to ask.",
)


def article(word: str) -> str:
    """`word` with its indefinite article: "a dog", "an owl"."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def opposite_facts() -> list[tuple[str, str]]:
    """(word, opposite), both ways round."""
    return [(a, b) for a, b in OPPOSITES] + [(b, a) for a, b in OPPOSITES]


def category_facts() -> list[tuple[str, str]]:
    """(member, kind)."""
    return [(m, kind) for kind, members in CATEGORIES.items() for m in members]


def colour_facts() -> list[tuple[str, str]]:
    """(thing, colour)."""
    return [(t, colour) for colour, things in COLOURS.items() for t in things]


def order_facts() -> list[tuple[str, str, str]]:
    """(item, the item after it, what such items are called)."""
    rings = [(DAYS, "day", True), (MONTHS, "month", True), (LETTERS, "letter", False), (NUMBERS, "number", False)]
    return [
        (items[i], items[(i + 1) % len(items)], kind)
        for items, kind, closed in rings
        for i in range(len(items) if closed else len(items) - 1)
    ]
