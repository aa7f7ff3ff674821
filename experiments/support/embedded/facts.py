"""The facts that pretraining states in plain text and that the instruction rows ask for.

A relation is a table from key to answer ("fox" -> "foxes") with the plain wordings of its facts. Wordings name their
parts in braces: {k} the key, {a} the answer, {ak} and {aa} the same with a or an before them, {dk} the key with the
article it needs, and {K}, {A}, {AK}, {DK} with a capital first letter. All of it is deterministic.
"""

import dataclasses
import random

from experiments.support.embedded import words

_MASS = {"drink", "metal", "sport", "spice", "planet"}
_LIST_WORDS = words.LIST_WORDS.split()


@dataclasses.dataclass(frozen=True)
class Relation:
    """One kind of fact: its table, how it is stated, how it is asked, and what heads a list of it."""

    name: str
    pairs: tuple[tuple[str, str], ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    key_label: str
    answer_label: str
    heading: str
    fresh: bool = False  # the pairs are examples of a rule, and the corpus adds unlimited others


@dataclasses.dataclass(frozen=True)
class Fact:
    """One entry of a relation's table."""

    relation: Relation
    key: str
    answer: str


def parse_table(text: str) -> list[list[str]]:
    """Entries of a word list, each a list of fields, underscores read as spaces."""
    entries = [entry.split() for entry in text.replace("\n", ",").split(",")]
    return [[field.replace("_", " ") for field in entry] for entry in entries if entry]


def article(word: str) -> str:
    """`word` with a or an before it."""
    return f"an {word}" if word[0].lower() in "aeiou" else f"a {word}"


def capital(text: str) -> str:
    """`text` with its first letter made a capital; the rest stays as it is."""
    return text[:1].upper() + text[1:]


def fill(wording: str, fact: Fact) -> str:
    """`wording` with the fact's key and answer put in."""
    key, answer = fact.key, fact.answer
    described = key if fact.relation.name != "category" or answer in _MASS else article(key)
    return wording.format(
        k=key,
        a=answer,
        K=capital(key),
        A=capital(answer),
        ak=article(key),
        aa=article(answer),
        AK=capital(article(key)),
        AA=capital(article(answer)),
        dk=described,
        DK=capital(described),
    )


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((entry[0], entry[1]) for entry in parse_table(text))


def _columns(text: str, column: int) -> tuple[tuple[str, str], ...]:
    return tuple((entry[0], entry[column]) for entry in parse_table(text))


def _opposites() -> tuple[tuple[str, str], ...]:
    pairs = _pairs(words.OPPOSITE)
    return pairs + tuple((b, a) for a, b in pairs)


def _categories() -> tuple[tuple[str, str], ...]:
    return tuple((key.replace("_", " "), name) for name, keys in words.CATEGORY.items() for key in keys.split())


def _spelling() -> tuple[str, ...]:
    """Words whose letters are stated: the keys of the lists of single words, each once, in order."""
    keys = [key for key, _ in (*_pairs(words.PLURAL), *_categories(), *_columns(words.COMPARATIVE, 1))]
    return tuple(dict.fromkeys(key for key in keys if key.isalpha() and key.islower() and len(key) > 2))


def larger(rng: random.Random) -> tuple[str, str]:
    """Two different numbers below 100 and the larger of them."""
    first, second = rng.sample(range(1, 100), 2)
    return f"{first} and {second}", str(max(first, second))


def last_word(rng: random.Random) -> tuple[str, str]:
    """Three different words and the last of them."""
    chosen = rng.sample(_LIST_WORDS, 3)
    return ", ".join(chosen), chosen[-1]


FRESH = {"larger": larger, "last_word": last_word}


def _examples(name: str, count: int) -> tuple[tuple[str, str], ...]:
    rng = random.Random(f"examples of {name}")
    found: dict[str, str] = {}
    while len(found) < count:
        key, answer = FRESH[name](rng)
        found[key] = answer
    return tuple(found.items())


RELATIONS = (
    Relation(
        "plural",
        _pairs(words.PLURAL),
        (
            "The plural of {k} is {a}.", "One {k}, two {a}.", "One {k}, many {a}.", "We say one {k} but three {a}.",
            "There was one {k}, and then there were ten {a}.", "If you have more than one {k}, you have {a}.",
            "{AK} is one; {a} are many.", "{A} is the plural of {k}.", "The word {k} becomes {a} in the plural.",
            "He had one {k}, but she had two {a}.",
        ),
        (
            "What is the plural of {k}?", "What do we call more than one {k}?", "How do you write the plural of {k}?",
            "One {k}, but two what?",
        ),
        "Singular", "Plural", "Plurals",
    ),
    Relation(
        "opposite",
        _opposites(),
        (
            "The opposite of {k} is {a}.", "{K} is the opposite of {a}.", "If it is not {k}, it may be {a}.",
            "{K} and {a} are opposites.", "The word {k} means the opposite of {a}.", "Not {k}, but {a}!",
            "The opposite of the word {k} is the word {a}.", "Think of {k}, turn it around, and you get {a}.",
        ),
        (
            "What is the opposite of {k}?", "Which word means the opposite of {k}?", "If not {k}, then what?",
            "What do you get when you turn {k} around?",
        ),
        "Word", "Opposite", "Opposites",
    ),
    Relation(
        "past",
        _pairs(words.PAST),
        (
            "The past tense of {k} is {a}.", "Today I {k}. Yesterday I {a}.", "Today we {k}; yesterday we {a}.",
            "{A} is the past tense of {k}.", "They {k} every day, and last week they {a} too.",
            "I {k} now, and I {a} a year ago.", "The verb {k} becomes {a} in the past.",
            "You {k} today. You {a} the day before.",
        ),
        (
            "What is the past tense of {k}?", "Today I {k}, but yesterday I what?", "What is the verb {k} in the past?",
            "How do we say {k} when it was yesterday?",
        ),
        "Verb", "Past tense", "Verbs in the past",
    ),
    Relation(
        "category",
        _categories(),
        (
            "{DK} is a kind of {a}.", "We know that {dk} is a kind of {a}.",
            "{K} belongs to the group {a}.", "The word {k} names a kind of {a}.", "The kind of thing {dk} is: {a}.",
            "{K} is in the group called {a}.",
        ),
        (
            "What kind of thing is {dk}?", "Which group does {k} belong to?", "What is {dk} a kind of?",
            "What does the word {k} name?",
        ),
        "Thing", "Kind", "Kinds of things",
    ),
    Relation(
        "capital",
        _columns(words.COUNTRY, 1),
        (
            "The capital of {k} is {a}.", "{A} is the capital of {k}.", "{K} has its capital at {a}.",
            "In {k}, the capital city is {a}.", "They flew to {k} and landed in the capital, {a}.",
            "The main city of {k} is {a}.", "The government of {k} sits in {a}.",
        ),
        (
            "What is the capital of {k}?", "Which city is the capital of {k}?", "What is the main city of {k}?",
            "Where does the government of {k} sit?",
        ),
        "Country", "Capital", "Capitals",
    ),
    Relation(
        "continent",
        _columns(words.COUNTRY, 2),
        (
            "{K} is a country in {a}.", "{K} is in {a}.", "The continent of {k} is {a}.",
            "You can find {k} on the map of {a}.", "In {a} there is a country called {k}.", "{K} is part of {a}.",
            "To see {k}, you must travel to {a}.",
        ),
        (
            "Which continent is {k} in?", "Where in the world is {k}?", "What is the continent of {k}?",
            "On which map do you find {k}?",
        ),
        "Country", "Continent", "Continents",
    ),
    Relation(
        "colour",
        _pairs(words.COLOUR),
        (
            "The colour of {k} is {a}.", "{K} is {a}.", "As {a} as {k}.", "{A} is the colour of {k}.",
            "She drew {k} and made it {a}.", "When you paint {k}, use {a} paint.", "We all know {k} is {a}.",
        ),
        (
            "What colour is {k}?", "What is the colour of {k}?", "Which paint do you need for {k}?",
        ),
        "Thing", "Colour", "Colours",
    ),
    Relation(
        "sound",
        _pairs(words.SOUND),
        (
            "The sound of {ak} is {a}.", "{AK} goes {a}.", "\"{A}!\" went the {k}.", "The {k} said, \"{A}, {a}!\"",
            "They heard {ak}: {a}, {a}, {a}!", "{A} is the sound {ak} makes.", "The sound that {ak} makes is {a}.",
        ),
        (
            "What sound does {ak} make?", "What does the {k} say?", "What is the sound of {ak}?",
        ),
        "Animal", "Sound", "Sounds of animals",
    ),
    Relation(
        "young",
        _pairs(words.YOUNG),
        (
            "A young {k} is called {aa}.", "A baby {k} is {aa}.", "{AA} grows up to be {ak}.",
            "The {k} looked after her {a}.", "The young of {ak} is {aa}.", "The baby of the {k} is the {a}.",
            "Look at the {k} and its little {a}.",
        ),
        (
            "What is a young {k} called?", "What do we call a baby {k}?", "What is the young of {ak}?",
        ),
        "Animal", "Young", "Young animals",
    ),
    Relation(
        "comparative",
        _columns(words.COMPARATIVE, 1),
        (
            "The comparative of {k} is {a}.", "This one is {k}, but that one is {a}.", "Tom is {k}. Anna is {a}.",
            "It was {k} before, and now it is {a}.", "More than {k} is {a}.", "{A} means more {k}.",
            "One day was {k}, the next was {a}.",
        ),
        (
            "What is the comparative of {k}?", "Tom is {k}, so Anna is even what?", "Which word means more {k}?",
        ),
        "Adjective", "Comparative", "Comparatives",
    ),
    Relation(
        "superlative",
        _columns(words.COMPARATIVE, 2),
        (
            "The superlative of {k} is {a}.", "They are all {k}, but this one is the {a}.", "The most {k} is the {a}.",
            "All of them were {k}, and the last was the {a} of all.", "{A} means most {k}.",
            "He is {k}, and she is the {a} in the world.",
        ),
        (
            "What is the superlative of {k}?", "Which word means most {k}?",
            "They are all {k}, but this one is the what?",
        ),
        "Adjective", "Superlative", "Superlatives",
    ),
    Relation(
        "addition",
        tuple((f"{a} + {b}", str(a + b)) for a in range(1, 13) for b in range(1, 13)),
        (
            "{k} = {a}.", "{k} is {a}.", "The sum {k} makes {a}.", "{k} equals {a}.", "We add {k} and get {a}.",
            "{a} is {k}.", "If you count {k}, you have {a}.",
        ),
        ("What is {k}?", "How much is {k}?", "What do you get for {k}?"),
        "Sum", "Result", "Sums",
    ),
    Relation(
        "next_number",
        tuple((str(n), str(n + 1)) for n in range(1, 120)),
        (
            "After {k} comes {a}.", "The number after {k} is {a}.", "Count on: {k}, {a}.", "{a} comes right after {k}.",
            "{k} and one more is {a}.", "The next number after {k} is {a}.", "First he counted {k}, then {a}.",
        ),
        ("Which number comes after {k}?", "What is the next number after {k}?", "What comes after {k} when you count?"),
        "Number", "Next number", "Counting on",
    ),
    Relation(
        "first_letter",
        tuple((word, word[0]) for word in _spelling()),
        (
            "The word {k} starts with the letter {a}.", "The first letter of {k} is {a}.", "{a} is for {k}.",
            "{k} begins with {a}.", "To write {k}, you start with {a}.", "In the word {k} the first letter is {a}.",
        ),
        ("What is the first letter of {k}?", "Which letter does {k} start with?", "How does the word {k} begin?"),
        "Word", "First letter", "First letters",
    ),
    Relation(
        "job",
        _pairs(words.JOB),
        (
            "A person who {k} is {aa}.", "{AA} {k}.", "He {k}, so he is {aa}.", "She {k} because she is {aa}.",
            "The {a} is the one who {k}.", "Somebody who {k} is called {aa}.", "In our town the {a} {k}.",
        ),
        ("Who {k}?", "What do you call a person who {k}?", "What is the job of somebody who {k}?"),
        "Work", "Job", "Jobs",
    ),
    Relation(
        "larger",
        _examples("larger", 140),
        (
            "Of {k}, the larger is {a}.", "Between {k}, the bigger number is {a}.", "Look at {k}: {a} is more.",
            "Of the numbers {k}, the greater is {a}.", "When we compare {k}, {a} is the larger.",
        ),
        ("Which is larger of {k}?", "Of {k}, which is more?", "What is the bigger number of {k}?"),
        "Numbers", "Larger", "Comparing numbers", fresh=True,
    ),
    Relation(
        "last_word",
        _examples("last_word", 140),
        (
            "In the list {k}, the last word is {a}.", "The list {k} ends with {a}.",
            "She read {k}, and the last was {a}.",
            "He said {k}. The last thing he said was {a}.", "The last of {k} is {a}.",
        ),
        ("What is the last word of {k}?", "Which word comes last in {k}?", "How does the list {k} end?"),
        "List", "Last word", "Last words", fresh=True,
    ),
)  # fmt: skip


def facts() -> list[Fact]:
    """Every fact of every relation, in the order of the tables."""
    return [Fact(relation, key, answer) for relation in RELATIONS for key, answer in relation.pairs]
