"""Generated instruction tasks of the demo: prompts and answers. Knows no tokenizer.

The kinds differ on purpose in how much they need attention: `opposite` is a fact about one word,
`retrieve` must find a line among others, `reverse` must look at every word of the prompt.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any
from zlib import crc32

Pair = tuple[str, str]
"""A prompt and its answer."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"

NAMES = tuple(
    "Ann Bob Cara Dan Eva Finn Gus Hana Ivan Jane Kim Leo Mia Ned Olga Paul Rosa Sam Tom "
    "Vera".split()
)

FOOD = tuple("apples pears plums nuts eggs figs beans limes cakes pies".split())

ITEMS = tuple("key book lamp ring coin hat cup ball pen map".split())

PLACES = tuple("box garden kitchen barn tower school boat shop cave hall".split())

COLOURS = tuple("red blue green black white brown yellow pink".split())

WORDS = tuple(
    "dog cat sun tree fish bird rain road hill door king star milk bread stone river house horse "
    "wind moon".split()
)

OPPOSITES = {
    "hot": "cold", "big": "small", "old": "new", "fast": "slow", "high": "low", "wet": "dry",
    "rich": "poor", "hard": "soft", "light": "dark", "good": "bad", "full": "empty",
    "open": "closed", "long": "short", "early": "late", "loud": "quiet", "strong": "weak",
    "near": "far", "thick": "thin", "up": "down", "left": "right", "day": "night", "love": "hate",
    "first": "last", "true": "false",
}  # fmt: skip

KINDS = {
    "animal": "dog cat horse lion cow sheep wolf bear".split(),
    "fruit": "apple pear plum lime fig grape peach cherry".split(),
    "colour": "red blue green black white brown yellow pink".split(),
    "metal": "gold silver iron copper tin lead zinc steel".split(),
    "tool": "hammer saw axe knife spade rake drill file".split(),
    "number": "one two three four five six seven eight".split(),
}

CAPITALS = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Greece": "Athens", "Egypt": "Cairo",
    "Japan": "Tokyo", "China": "Beijing", "Russia": "Moscow", "Norway": "Oslo", "Cuba": "Havana",
    "Peru": "Lima", "Kenya": "Nairobi", "Ireland": "Dublin", "Germany": "Berlin",
    "Austria": "Vienna", "Portugal": "Lisbon", "Poland": "Warsaw", "Hungary": "Budapest",
    "Chile": "Santiago", "Canada": "Ottawa",
}  # fmt: skip

PLURALS = {
    "child": "children", "man": "men", "woman": "women", "mouse": "mice", "foot": "feet",
    "tooth": "teeth", "goose": "geese", "ox": "oxen", "leaf": "leaves", "knife": "knives",
    "wolf": "wolves", "city": "cities", "baby": "babies", "box": "boxes", "sheep": "sheep",
    "fish": "fish", "dog": "dogs", "tree": "trees", "king": "kings", "church": "churches",
    "lady": "ladies", "life": "lives", "thief": "thieves", "hero": "heroes",
}  # fmt: skip

CHATTER = (
    "It is a cold day.", "The road is long.", "We have some time.", "The sun is high.",
    "I sat by the river.", "The wind is loud tonight.", "My friend is late again.",
    "The old house is quiet.", "There is bread and milk.", "They went up the hill.",
    "The king is not here.", "A bird sings in the tree.",
)  # fmt: skip
"""Sentences that no answer depends on: they lengthen a prompt."""


def make_row(rng: Random, task: str, *, held_out: bool) -> dict[str, Any]:
    """Return one conversation of the named task, in messages format with a `task` key.

    A fifth of all prompts are held out: the backbone never sees them, the instruction set has no
    others.
    """
    prompt, answer = TASKS[task](rng)
    while is_held_out(prompt) != held_out:
        prompt, answer = TASKS[task](rng)
    return as_row(prompt, answer, task)


def is_held_out(prompt: str) -> bool:
    """Tell from the prompt alone on which side it belongs, whatever seed made it."""
    return crc32(prompt.encode()) % 5 == 0


def as_row(prompt: str, answer: str, task: str) -> dict[str, Any]:
    """Write a prompt and its answer as a row in messages format."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "task": task}


def distinct_rows(rng: Random, count: int) -> list[dict[str, Any]]:
    """Return `count` held-out rows of as many tasks, balanced and shuffled, no prompt twice."""
    rows: dict[str, dict[str, Any]] = {}
    names = sorted(TASKS)
    while len(rows) < count:
        row = make_row(rng, names[len(rows) % len(names)], held_out=True)
        rows.setdefault(prompt_of(row), row)
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    return shuffled


def prompt_of(row: dict[str, Any]) -> str:
    """Return what the user says in a row of this module."""
    prompt: str = row["messages"][0]["content"]
    return prompt


def continuation(sentence: str) -> Pair | None:
    """Cut a sentence of the text into its beginning and the few words to go on with."""
    words = sentence.split()
    if not 9 <= len(words) <= 24:
        return None
    cut = max(len(words) - 8, len(words) // 2)
    return f"Continue: {' '.join(words[:cut])}", " ".join(words[cut:])


def _owner(rng: Random) -> Pair:
    count = rng.randint(2, 5)
    people, foods = rng.sample(NAMES, count), rng.sample(FOOD, count)
    numbers = [rng.randint(2, 9) for _ in people]
    facts = [f"{p} has {n} {f}." for p, n, f in zip(people, numbers, foods, strict=True)]
    story, pick = " ".join(facts), rng.randrange(count)
    if rng.random() < 0.5:
        return f"{story} Who has {foods[pick]}?", people[pick]
    return f"{story} How many {foods[pick]} has {people[pick]}?", str(numbers[pick])


def _retrieve(rng: Random) -> Pair:
    count = rng.randint(2, 4)
    items, places = rng.sample(ITEMS, count), rng.sample(PLACES, count)
    colours = [rng.choice(COLOURS) for _ in items]
    lines = [f"The {c} {i} is in the {p}." for c, i, p in zip(colours, items, places, strict=True)]
    if rng.random() < 0.5:
        lines.insert(rng.randint(0, count), rng.choice(CHATTER))
    story, pick = " ".join(lines), rng.randrange(count)
    if rng.random() < 0.5:
        return f"{story} Where is the {items[pick]}?", f"in the {places[pick]}"
    return f"{story} What colour is the {items[pick]}?", colours[pick]


def _copy(rng: Random) -> Pair:
    words = _some(rng, (*WORDS, *COLOURS), 3, 10)
    return f"{rng.choice(('Repeat', 'Copy', 'Say again'))}: {words}", words


def _reverse(rng: Random) -> Pair:
    words = rng.sample(WORDS, rng.randint(2, 5))
    asked = rng.choice(("Reverse", "Say backwards"))
    return f"{asked}: {' '.join(words)}", " ".join(reversed(words))


def _sort(rng: Random) -> Pair:
    if rng.random() < 0.5:
        things = [str(n) for n in rng.sample(range(10), rng.randint(3, 5))]
    else:
        things = rng.sample(LETTERS, rng.randint(3, 5))
    return f"Sort: {' '.join(things)}", " ".join(sorted(things))


def _next(rng: Random) -> Pair:
    length, step = rng.randint(3, 6), rng.randint(1, 3)
    if rng.random() < 0.5:
        start = rng.randint(0, 30)
        series = [str(start + step * k) for k in range(length + 1)]
    else:
        start = rng.randint(0, len(LETTERS) - step * length - 1)
        series = [LETTERS[start + step * k] for k in range(length + 1)]
    return _chatty(rng, f"What comes next? {' '.join(series[:-1])}"), series[-1]


def _add(rng: Random) -> Pair:
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    return _chatty(rng, f"What is {a} plus {b}?"), str(a + b)


def _count(rng: Random) -> Pair:
    target, *others = rng.sample(WORDS, 4)
    times = rng.randint(1, 5)
    words = [target] * times + [rng.choice(others) for _ in range(rng.randint(1, 5))]
    rng.shuffle(words)
    return f"How many times is {target} here? {' '.join(words)}", str(times)


def _pick(rng: Random) -> Pair:
    words = rng.sample((*WORDS, *COLOURS), rng.randint(3, 8))
    place, index = rng.choice((("first", 0), ("second", 1), ("last", -1)))
    return f"Which word is {place}? {' '.join(words)}", words[index]


def _member(rng: Random) -> Pair:
    words = rng.sample(WORDS, rng.randint(3, 8))
    if rng.random() < 0.5:
        return f"Is {rng.choice(words)} in this list? {' '.join(words)}", "yes"
    absent = rng.choice([word for word in WORDS if word not in words])
    return f"Is {absent} in this list? {' '.join(words)}", "no"


def _opposite(rng: Random) -> Pair:
    pair = rng.choice(sorted(OPPOSITES.items()))
    asked, answer = rng.sample(pair, 2)
    return _chatty(rng, f"What is the opposite of {asked}?"), answer


def _kind(rng: Random) -> Pair:
    kind = rng.choice(sorted(KINDS))
    return _chatty(rng, f"What kind of thing is {rng.choice(KINDS[kind])}?"), f"a kind of {kind}"


def _plural(rng: Random) -> Pair:
    one, many = rng.choice(sorted(PLURALS.items()))
    return _chatty(rng, f"What is the plural of {one}?"), many


def _capital(rng: Random) -> Pair:
    country, city = rng.choice(sorted(CAPITALS.items()))
    return _chatty(rng, f"What is the capital of {country}?"), f"{city} is the capital."


def _some(rng: Random, words: Sequence[str], least: int, most: int) -> str:
    return " ".join(rng.choice(words) for _ in range(rng.randint(least, most)))


def _chatty(rng: Random, question: str) -> str:
    """Put up to five sentences before a question that does not need them."""
    return " ".join([*rng.sample(CHATTER, rng.randint(0, 5)), question])


TASKS: dict[str, Callable[[Random], Pair]] = {
    "add": _add,
    "capital": _capital,
    "copy": _copy,
    "count": _count,
    "kind": _kind,
    "member": _member,
    "next": _next,
    "opposite": _opposite,
    "owner": _owner,
    "pick": _pick,
    "plural": _plural,
    "retrieve": _retrieve,
    "reverse": _reverse,
    "sort": _sort,
}
"""Task name -> the maker of one prompt and its answer."""
