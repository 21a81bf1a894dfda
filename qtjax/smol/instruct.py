"""smol-instruct: instruction rows with checkable answers, made here, the same for the same seed on every machine.

Ten task families. Four ask for facts (opposite, category, colour, next), two for arithmetic (compare, add), four for
something that stands in the prompt (lookup, position, yesno, repeat). Every answer is one sentence of evidence and
then "The answer is ...", so that there are tokens worth pruning. A row says how it was made, its provenance:

    clean        the right answer
    mislabelled  a fluent wrong answer of the same type
    redundant    one of a few very easy questions, asked again and again
    padded       the right answer between irrelevant sentences

A question is identified by its key (the fact, the pair of numbers, the context); keys are divided between train and
test once and for all, so a tested fact is never shown in training in any wording.
"""

import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

from qtjax.errors import QtjaxError
from qtjax.smol import words
from qtjax.smol.draw import Draw

TRAIN_ROWS = 2048
TEST_ROWS = 512
SHARES = {"clean": 55, "mislabelled": 15, "redundant": 20, "padded": 10}  # percent of the train split
TEST_PERCENT = 20  # of the keys
OPENINGS = ("", "", "", "Please help me. ", "A short question. ", "Tell me this. ", "Think first. ")


class Item(NamedTuple):
    """One question: `evidence` and `wrong_evidence` are the sentences before the answer, right and wrong."""

    key: str
    prompt: str
    evidence: str
    answer: str
    wrong_evidence: str
    wrong_answer: str


def _other(draw: Draw, items: list[str] | tuple[str, ...], right: str) -> str:
    while (item := draw.pick(items)) == right:
        pass
    return item


def _opposite(draw: Draw) -> Item:
    facts = words.opposite_facts()
    word, right = draw.pick(facts)
    wrong = _other(draw, [b for a, b in facts if a != word], right)
    ask = draw.pick(("What is the opposite of {}?", "Which word is the opposite of {}?", "Give the opposite of {}."))
    return Item(word, ask.format(word), f"The opposite of {word} is {right}.", right, f"The opposite of {word} is {wrong}.", wrong)


def _category(draw: Draw) -> Item:
    member, right = draw.pick(words.category_facts())
    wrong, a = _other(draw, tuple(words.CATEGORIES), right), words.article
    ask = draw.pick(("What kind of thing is {}?", "What do we call {}?", "Which group has {} in it?"))
    evidence = f"{a(member).capitalize()} is"
    return Item(member, ask.format(a(member)), f"{evidence} {a(right)}.", right, f"{evidence} {a(wrong)}.", wrong)


def _colour(draw: Draw) -> Item:
    thing, right = draw.pick(words.colour_facts())
    wrong = _other(draw, tuple(words.COLOURS), right)
    ask = draw.pick(("What colour is {}?", "Which colour has {}?", "Name the colour of {}."))
    evidence = f"The colour of {thing} is"
    return Item(thing, ask.format(thing), f"{evidence} {right}.", right, f"{evidence} {wrong}.", wrong)


def _next(draw: Draw) -> Item:
    rings = {"day": words.DAYS, "month": words.MONTHS, "letter": words.LETTERS, "number": words.NUMBERS}
    kind = draw.pick(tuple(rings))
    item, right, _ = draw.pick([fact for fact in words.order_facts() if fact[2] == kind])
    wrong = _other(draw, rings[kind], right)
    ask = draw.pick(("Which {k} comes after {i}?", "What is the next {k} after {i}?", "Name the {k} that follows {i}."))
    return Item(item, ask.format(k=kind, i=item), f"After {item} comes {right}.", right, f"After {item} comes {wrong}.", wrong)


def _compare(draw: Draw) -> Item:
    a, b = draw.sample(range(1, 100), 2)
    right, wrong = max(a, b), min(a, b)
    ask = draw.pick(("Which is larger, {} or {}?", "Which number is more, {} or {}?", "Take the larger of {} and {}."))
    return Item(
        f"{wrong}<{right}", ask.format(a, b), f"{right} is more than {wrong}.", str(right), f"{wrong} is more than {right}.", str(wrong)
    )


def _add(draw: Draw) -> Item:
    a, b = draw.between(1, 9), draw.between(1, 9)
    right, wrong = str(a + b), _other(draw, [str(n) for n in range(2, 19)], str(a + b))
    ask = draw.pick(("What is {} plus {}?", "Add {} and {}.", "How much is {} plus {}?"))
    return Item(
        f"{min(a, b)}+{max(a, b)}", ask.format(a, b), f"{a} plus {b} is {right}.", right, f"{a} plus {b} is {wrong}.", wrong
    )


def owners(draw: Draw, count: int) -> list[tuple[str, str, str]]:
    """(name, number, things), `count` of them, names and things all different."""
    names, goods = draw.sample(words.NAMES, count), draw.sample(words.GOODS, count)
    return [(n, str(draw.between(2, 9)), g) for n, g in zip(names, goods, strict=True)]


def _lookup(draw: Draw) -> Item:
    if draw.chance(50):
        people = owners(draw, draw.between(2, 3))
        context = " ".join(f"{n} has {c} {g}." for n, c, g in people)
        (name, c, g), (_, wc, wg) = draw.sample(people, 2)
        ask = draw.pick(("What does {} have?", "Say what {} has.", "Which things has {}?")).format(name)
        return Item(context, f"{context} {ask}", f"{name} has {c} {g}.", f"{c} {g}", f"{name} has {wc} {wg}.", f"{wc} {wg}")
    count = draw.between(2, 3)
    things = list(zip(draw.sample(words.OBJECTS, count), draw.sample(words.PLACES, count), strict=True))
    context = " ".join(f"The {o} is in the {p}." for o, p in things)
    (thing, place), (_, wrong) = draw.sample(things, 2)
    ask = draw.pick(("Where is the {}?", "In which place is the {}?", "Say where the {} is.")).format(thing)
    return Item(context, f"{context} {ask}", f"The {thing} is in the {place}.", place, f"The {thing} is in the {wrong}.", wrong)


def _position(draw: Draw) -> Item:
    items = draw.sample(words.WORDS, draw.between(3, 4))
    which, right = ("first", items[0]) if draw.chance(50) else ("last", items[-1])
    wrong, listed = _other(draw, items, right), ", ".join(items)
    ask = draw.pick(
        ("Here is a list: {l}. What is the {w} word?", "What is the {w} word of this list? {l}.", "List: {l}. Say the {w} word.")
    )
    prompt = ask.format(l=listed, w=which)
    return Item(listed, prompt, f"The {which} word is {right}.", right, f"The {which} word is {wrong}.", wrong)


def _yesno(draw: Draw) -> Item:
    people = owners(draw, 2)
    (name, count, goods), (_, _, others) = draw.sample(people, 2)
    right = draw.chance(50)
    context = " ".join(f"{n} has {c} {g}." for n, c, g in people)
    ask = draw.pick(("Does {n} have {g}?", "Yes or no, does {n} have {g}?", "Is it true that {n} has {g}?"))
    evidence, said = f"{name} has {count} {goods}.", ("no", "yes")
    return Item(context, f"{context} {ask.format(n=name, g=goods if right else others)}", evidence, said[right], evidence, said[not right])


def _repeat(draw: Draw) -> Item:
    items = draw.sample(words.WORDS, draw.between(2, 3))
    right, wrong = " ".join(items), " ".join(draw.sample(words.WORDS, len(items)))
    ask = draw.pick(("Repeat these words: {}.", "Say this again: {}.", "Copy the words {}."))
    if wrong == right:
        wrong = f"{wrong} {items[0]}"
    return Item(right, ask.format(right), f"The words are {right}.", right, f"The words are {wrong}.", wrong)


FAMILIES: dict[str, Callable[[Draw], Item]] = {
    "opposite": _opposite,
    "category": _category,
    "colour": _colour,
    "next": _next,
    "compare": _compare,
    "add": _add,
    "lookup": _lookup,
    "position": _position,
    "yesno": _yesno,
    "repeat": _repeat,
}
EASY: tuple[tuple[str, Item], ...] = (
    ("opposite", Item("hot", "What is the opposite of hot?", "The opposite of hot is cold.", "cold", "", "")),
    ("category", Item("dog", "What kind of thing is a dog?", "A dog is an animal.", "animal", "", "")),
    ("colour", Item("snow", "What colour is snow?", "The colour of snow is white.", "white", "", "")),
    ("next", Item("Monday", "Which day comes after Monday?", "After Monday comes Tuesday.", "Tuesday", "", "")),
    ("add", Item("1+1", "What is 1 plus 1?", "1 plus 1 is 2.", "2", "", "")),
    ("next", Item("a", "Which letter comes after a?", "After a comes b.", "b", "", "")),
)


def is_test_key(task: str, key: str) -> bool:
    """Whether the question belongs to the test split; the rest belongs to train. Fixed, whatever the seed."""
    if any(task == t and key == item.key for t, item in EASY):
        return False
    return zlib.crc32(f"{task}/{key}".encode()) % 100 < TEST_PERCENT


def _pad(draw: Draw, text: str) -> str:
    before, after = draw.between(1, 2), draw.between(0, 1)
    fillers = draw.sample(words.FILLERS, before + after)
    return " ".join([*fillers[:before], text, *fillers[before:]])


def _row(draw: Draw, test: bool, provenance: str, tasks: list[str], seen: set[str]) -> dict[str, Any]:
    """One row. A prompt is not used twice (but for redundant rows) until 200 draws found no new one."""
    if provenance == "redundant":
        task, item = draw.pick(EASY)
        prompt = draw.pick(OPENINGS) + item.prompt
    else:
        task = tasks.pop()
        for _ in range(200):
            item = FAMILIES[task](draw)
            prompt = draw.pick(OPENINGS) + item.prompt
            if is_test_key(task, item.key) == test and prompt not in seen:
                break
        else:
            while is_test_key(task, item.key) != test:
                item = FAMILIES[task](draw)
            prompt = draw.pick(OPENINGS) + item.prompt
        seen.add(prompt)
    wrong = provenance == "mislabelled"
    said = f"{item.wrong_evidence if wrong else item.evidence} The answer is {item.wrong_answer if wrong else item.answer}."
    if provenance == "padded":
        said = _pad(draw, said)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": said}]
    return {"messages": messages, "answer": item.answer, "task": task, "provenance": provenance}


def load_rows(split: str = "train", count: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of a split.

    Args:
      split: "train" (provenances mixed as in SHARES) or "test" (all clean).
      count: how many rows; None: TRAIN_ROWS or TEST_ROWS.
      seed: 0 or more; another seed gives other rows, but the same division of questions into train and test.
    Returns: dicts with `messages` (user, assistant), `answer` (the RIGHT answer, also where the row is mislabelled),
      `task`, `provenance` and `id`.
    Raises: QtjaxError for an unknown split, a negative count or seed.
    """
    if split not in ("train", "test"):
        raise QtjaxError(f"smol-instruct has no split {split!r}: must be train or test")
    count = {"train": TRAIN_ROWS, "test": TEST_ROWS}[split] if count is None else count
    if count < 0 or seed < 0:
        raise QtjaxError(f"smol-instruct: count = {count} and seed = {seed} must be 0 or more")
    test = split == "test"
    draw = Draw(seed, stream=int(test))
    kinds = ["clean"] * count
    if not test:
        kinds = [kind for kind, share in SHARES.items() for _ in range(count * share // 100)]
        kinds += ["clean"] * (count - len(kinds))
        draw.shuffle(kinds)
    tasks: list[str] = []
    seen: set[str] = set()
    rows = []
    for i, kind in enumerate(kinds):
        if not tasks:
            tasks = list(FAMILIES)
            draw.shuffle(tasks)
        rows.append(_row(draw, test, kind, tasks, seen) | {"id": f"smol-instruct-{split}-{seed}-{i:05d}"})
    return rows


def final_answer(text: str) -> str:
    """What `text` finally says, normalised: after its last "the answer is" up to the end of that sentence, or else its
    last sentence; lower case, no punctuation, no leading article, single spaces. Empty text gives ""."""
    plain = " ".join(text.lower().split())
    start = plain.rfind("the answer is")
    sentences = [s for s in re.split(r"[.!?]", plain[start + len("the answer is") :] if start >= 0 else plain) if s.strip()]
    if not sentences:
        return ""
    said = re.sub(r"[^\w\s]", " ", sentences[0] if start >= 0 else sentences[-1])
    return re.sub(r"^(the|an|a) (?=\S)", "", " ".join(said.split()))


def check(answer: str, generated_text: str) -> bool:
    """Exact match: whether the final answer of `generated_text` is `answer`, both normalised by `final_answer`."""
    return final_answer(generated_text) == final_answer(answer) != ""
