"""Plain-text documents about smol's small world: facts, runs, sums, short stories with repeated names, copied words.

They practise what the instructions of `smol-instruct` ask for, in other wordings and without the chat template, so
that fine-tuning has to teach a way of answering, not the facts. Repetition is deliberate: copying from the context
(induction) forms early on it. "The answer is" never occurs here.
"""

from collections.abc import Callable

from qtjax.smol import words
from qtjax.smol.draw import Draw
from qtjax.smol.instruct import owners

_OPPOSITES = words.opposite_facts()
_CATEGORIES = words.category_facts()
_COLOURS = words.colour_facts()
_NEXT = words.order_facts()
_POOLS = (
    words.LETTERS[:10], words.LETTERS[:10], words.LETTERS, words.DAYS, words.NAMES[:10], words.WORDS[:10], words.PLACES,
    (*words.WORDS, *words.GOODS, *words.PLACES, *words.NAMES, *(a for a, _ in _OPPOSITES + _CATEGORIES + _COLOURS)),
)  # fmt: skip


def _cap(text: str) -> str:
    return text[0].upper() + text[1:]


def _a(word: str) -> str:
    return words.article(word)


def _opposite(draw: Draw) -> str:
    a, b = draw.pick(_OPPOSITES)
    return draw.pick(
        (
            f"The opposite of {a} is {b}.",
            f"The opposite of {a} is {b}.",
            f"The opposite of {a} is {b}, and the opposite of {b} is {a}.",
            f"What is not {a} may be {b}.",
            f"{_cap(a)} and {b} are opposites.",
            f"Do you know the opposite of {a}? The opposite of {a} is {b}.",
            f"And the opposite of {a}? The opposite of {a} is {b}.",
            f"The opposite of {a}? {_cap(b)}.",
        )
    )


def _category(draw: Draw) -> str:
    m, kind = draw.pick(_CATEGORIES)
    others = draw.sample(words.CATEGORIES[kind], 4)
    return draw.pick(
        (
            f"{_cap(_a(m))} is {_a(kind)}.",
            f"{_cap(_a(m))} is {_a(kind)}.",
            f"{_cap(_a(m))} is one kind of {kind}.",
            f"And {_a(m)}? {_cap(_a(m))} is {_a(kind)}.",
            f"Do you know what {_a(m)} is? {_cap(_a(m))} is {_a(kind)}.",
            f"{_cap(kind)}: {', '.join(others)}.",
            f"{_cap(_a(m))} and {_a(others[0] if others[0] != m else others[1])}: each is {_a(kind)}.",
        )
    )


def _colour(draw: Draw) -> str:
    thing, colour = draw.pick(_COLOURS)
    return draw.pick(
        (
            f"The colour of {thing} is {colour}.",
            f"The colour of {thing} is {colour}.",
            f"{_cap(thing)} is {colour}.",
            f"And the colour of {thing}? The colour of {thing} is {colour}.",
            f"Do you know {thing}? The colour of {thing} is {colour}.",
            f"{_cap(colour)} is the colour of {thing}.",
            f"{_cap(colour)}: {', '.join(draw.sample(words.COLOURS[colour], 3))}.",
        )
    )


def _next(draw: Draw) -> str:
    kind = draw.pick(("day", "month", "letter", "number", "number"))
    item, then, _ = draw.pick([fact for fact in _NEXT if fact[2] == kind])
    return draw.pick(
        (
            f"After {item} comes {then}.",
            f"After {item} comes {then}.",
            f"{_cap(then)} comes after {item}." if kind != "letter" else f"The {kind} {then} comes after {item}.",
            f"And after {item}? After {item} comes {then}.",
            f"Do you know the {kind} behind {item}? After {item} comes {then}.",
            _run(draw),
        )
    )


def _run(draw: Draw) -> str:
    items = draw.pick((words.DAYS, words.MONTHS, words.LETTERS, words.NUMBERS, words.NUMBERS))
    length = draw.between(4, 7)
    start = draw.below(len(items) - length + 1)
    return _cap(", ".join(items[start : start + length])) + "."


def _compare(draw: Draw) -> str:
    numbers = draw.sample(range(1, 100), draw.between(2, 4))
    low, high = sorted(numbers[:2])
    return draw.pick(
        (
            f"{high} is more than {low}.",
            f"{high} is more than {low}.",
            f"{low} or {high}? {high} is more than {low}." if draw.chance(50) else f"{high} or {low}? {high} is more than {low}.",
            f"{low} or {high}? {high} is more than {low}." if draw.chance(50) else f"{high} or {low}? {high} is more than {low}.",
            f"{low} is less than {high}.",
            f"From small to large: {', '.join(map(str, sorted(numbers)))}.",
        )
    )


def _add(draw: Draw) -> str:
    a, b = draw.between(1, 9), draw.between(1, 9)
    goods, name = draw.pick(words.GOODS), draw.pick(words.NAMES)
    return draw.pick(
        (
            f"{a} plus {b} is {a + b}.",
            f"{a} plus {b} is {a + b}.",
            f"And {a} with {b}? {a} plus {b} is {a + b}.",
            f"Do you know {a} and {b}? {a} plus {b} is {a + b}.",
            f"{a} + {b} = {a + b}.",
            f"{name} had {a} {goods} and took {b} more. Now {name} has {a + b} {goods}.",
        )
    )


def _story(draw: Draw) -> str:
    """Owners and their things, then the same facts asked for again."""
    people = owners(draw, draw.between(2, 4))
    text = [" ".join(f"{n} has {c} {g}." for n, c, g in people)]
    for _ in range(draw.between(1, 3)):
        (name, count, goods), (_, _, others) = draw.sample(people, 2)
        text.append(
            draw.pick(
                (
                    f"And {name}? {name} has {count} {goods}.",
                    f"So {name} has {count} {goods}.",
                    f"Look at {name}: {name} has {count} {goods}.",
                    f"Who has {goods}? {name} has {goods}.",
                    f"Has {name} got {goods}? {name} has {count} {goods}. So yes.",
                    f"Has {name} got {others}? {name} has {count} {goods}. So no.",
                    f"Are there {goods} with {name}? {name} has {count} {goods}. So yes.",
                    f"Are there {others} with {name}? {name} has {count} {goods}. So no.",
                )
            )
        )
    return " ".join(text)


def _places(draw: Draw) -> str:
    count = draw.between(2, 4)
    things = list(zip(draw.sample(words.OBJECTS, count), draw.sample(words.PLACES, count), strict=True))
    text = [" ".join(f"The {o} is in the {p}." for o, p in things)]
    for _ in range(draw.between(1, 3)):
        thing, place = draw.pick(things)
        text.append(
            draw.pick(
                (
                    f"And the {thing}? The {thing} is in the {place}.",
                    f"Look for the {thing}. The {thing} is in the {place}.",
                    f"In the {place} is the {thing}.",
                    f"{draw.pick(words.NAMES)} went to the {place} and found the {thing}.",
                )
            )
        )
    return " ".join(text)


def _list(draw: Draw) -> str:
    items = draw.sample(words.WORDS, draw.between(3, 5))
    listed = ", ".join(items)
    ends = [f"The first word is {items[0]}.", f"The last word is {items[-1]}."]
    draw.shuffle(ends)
    return draw.pick(
        (
            f"The list was {listed}. {' '.join(ends)}",
            f"{_cap(listed)}. {ends[0]}",
            f"What begins {listed}? The first word is {items[0]}.",
            f"What ends {listed}? The last word is {items[-1]}.",
            f"{draw.pick(words.NAMES)} wrote {listed}. {' '.join(ends)}",
            f"{_cap(listed)}. It begins with {items[0]} and ends with {items[-1]}.",
        )
    )


def _echo(draw: Draw) -> str:
    items = draw.sample(words.WORDS, draw.between(2, 5))
    said, (a, b) = " ".join(items), draw.sample(words.NAMES, 2)
    return draw.pick(
        (
            f'{a} said "{said}". {b} said "{said}" too.',
            f"{a} sang: {said}. Then {b} sang: {said}.",
            f"{_cap(said)}, {said}, {said}.",
            f"The words were {said}. Once more: {said}.",
            f"{a} heard {said}. The words are {said}.",
        )
    )


def _sung(draw: Draw, pool: tuple[str, ...]) -> str:
    line = " ".join(draw.sample(pool, draw.between(3, 7)))
    return f"{line} " * draw.between(2, 4) + line + "."


def small_chorus(draw: Draw) -> str:
    """A chorus from 10 or 12 symbols (qtjax.smol.corpus.primer)."""
    return _sung(draw, draw.pick((words.LETTERS[:10], words.LETTERS[:12], words.NAMES[:10], words.WORDS[:10])))


def _chorus(draw: Draw) -> str:
    """A few words sung again and again. From a small pool all lines hold nearly the same words, so that only their
    order tells what comes next: copying by order is learned on these in a few hundred steps, and on all words never
    in as many (knowing WHICH words occur already pays there)."""
    return _sung(draw, draw.pick(_POOLS))


def _recap(draw: Draw) -> str:
    """A fact and its key word again, as an answer repeats its evidence."""
    a, b = draw.pick(draw.pick((_OPPOSITES, _COLOURS, _CATEGORIES)))
    return draw.pick((f"{_cap(a)} goes with {b}. So, {b}.", f"For {a} we say {b}. Yes, {b}.", f"{_cap(a)}, {b}. {_cap(a)}, {b}."))


TALKS: tuple[Callable[[Draw], str], ...] = (
    _opposite, _category, _colour, _next, _compare, _add, _story, _places, _list, _echo, _recap,
    _chorus, _chorus, _chorus, _chorus, _chorus,
)  # fmt: skip


def lesson(draw: Draw) -> str:
    """One document: a few pieces of one kind or of mixed kinds, under 450 characters and 256 of smol's tokens."""
    kind, size = draw.pick(TALKS), draw.between(150, 420)
    mixed = draw.chance(40)
    text = kind(draw)
    while len(text) < size:
        piece = (draw.pick(TALKS) if mixed else kind)(draw)
        if len(text) + len(piece) > 430:
            break
        text += " " + piece
    return text
