"""The quickstart's instruction set: rows {instruction, input, output} in Alpaca's form, and a held-out split of them.

Each row asks for one fact of `facts.py`. Training and held-out rows share the wordings of their instructions but no
item: a word, number or list that a held-out row asks about stands in no training row, whatever the task. The wordings
are imperative and appear nowhere in the pretraining text, so a pretrained model knows the facts and not the form.
"""

import random

from experiments.support.embedded.facts import RELATIONS, Fact, facts, fill

TRAIN_ROWS = 1_500
HELD_OUT_ROWS = 200
MAX_ROWS_PER_TASK = 160

# Wordings with the item in the input, then wordings that carry it themselves.
WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "plural": (
        ("Give the plural of the noun.", "Write this word in the plural.", "Turn the singular into its plural."),
        ("Give the plural of the noun {k}.", "Write the word {k} in the plural."),
    ),
    "opposite": (
        ("Give the opposite of the word.", "Write the word that is the opposite.", "Find the opposite of this word."),
        ("Give me the opposite of {k}.", "Write the opposite of the word {k}."),
    ),
    "past": (
        ("Give the past tense of the verb.", "Put this verb into the past tense.", "Write the past of the verb."),
        ("Give the past tense of the verb {k}.", "Put the verb {k} into the past tense."),
    ),
    "category": (
        ("Name the kind of thing.", "Say which group this belongs to.", "Tell me what kind of thing this is."),
        ("Name the kind of thing that {dk} is.", "Say which group {k} belongs to."),
    ),
    "capital": (
        (
            "Name the capital of the country.", "Give the capital city.",
            "Write the name of the capital of this country.",
        ),
        ("Name the capital city of {k}.", "Give me the capital of {k}."),
    ),
    "continent": (
        ("Name the continent of the country.", "Say which continent this country is in.", "Give the continent."),
        ("Name the continent of {k}.", "Say which continent {k} is in."),
    ),
    "colour": (
        ("Name the colour of this thing.", "Give the colour.", "Say what colour this has."),
        ("Name the colour of {k}.", "Say what colour {k} has."),
    ),
    "sound": (
        ("Write the sound of this animal.", "Give the sound that the animal makes.", "Say what this animal says."),
        ("Write the sound of {ak}.", "Give the sound that {ak} makes."),
    ),
    "young": (
        (
            "Name the young of this animal.", "Say what a baby of this animal is called.",
            "Give the name of the young animal.",
        ),
        ("Name the young of {ak}.", "Say what a baby {k} is called."),
    ),
    "comparative": (
        (
            "Give the comparative of the adjective.", "Write the comparative of this word.",
            "Put the word into the comparative.",
        ),
        ("Give the comparative of {k}.", "Write the comparative of the word {k}."),
    ),
    "superlative": (
        (
            "Give the superlative of the adjective.", "Write the superlative of this word.",
            "Put the word into the superlative.",
        ),
        ("Give the superlative of {k}.", "Write the superlative of the word {k}."),
    ),
    "addition": (
        ("Add the numbers.", "Work out the sum.", "Give the result of this sum."),
        ("Work out {k}.", "Give the result of {k}."),
    ),
    "next_number": (
        ("Give the number that comes after this one.", "Write the next number.", "Count on by one."),
        ("Give the number that comes after {k}.", "Write the next number after {k}."),
    ),
    "first_letter": (
        ("Give the first letter of the word.", "Write the letter this word starts with.", "Name the first letter."),
        ("Give the first letter of {k}.", "Write the letter that {k} starts with."),
    ),
    "job": (
        ("Name the job of a person who does this.", "Say who does this work.", "Give the name of the job."),
        ("Name the job of a person who {k}.", "Name the person who {k}."),
    ),
    "larger": (
        ("Write the larger number.", "Name the bigger of the two numbers.", "Choose the larger of the numbers."),
        ("Write the larger of {k}.", "Choose the bigger number of {k}."),
    ),
    "last_word": (
        ("Write the last word of the list.", "Name the word that comes last.", "Copy the last word."),
        ("Write the last word of the list {k}.", "Name the word that comes last in {k}."),
    ),
}  # fmt: skip


def split(seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training rows and held-out rows, each in a shuffled order that the seed fixes."""
    rng = random.Random(seed)
    shuffled = facts()
    rng.shuffle(shuffled)
    held_out = _choose_held_out(shuffled)
    blocked = set().union(*(items(fact) for fact in held_out))
    remaining = [fact for fact in shuffled if not items(fact) & blocked]
    counts = dict.fromkeys(WORDINGS, 0)
    train: list[Fact] = []
    for fact in remaining:
        counts[fact.relation.name] += 1
        if counts[fact.relation.name] <= MAX_ROWS_PER_TASK:
            train.append(fact)
    return [_row(fact, rng) for fact in train[:TRAIN_ROWS]], [_row(fact, rng) for fact in held_out]


def items(fact: Fact) -> set[str]:
    """What must stand in one split only: the fact's key, and the keys that ask for the same thing."""
    if fact.relation.name == "opposite":
        return {fact.key, fact.answer}
    for sign in (" + ", " and "):
        if sign in fact.key:
            return {fact.key, sign.join(reversed(fact.key.split(sign)))}
    return {fact.key}


def held_out_facts(seed: int = 0) -> list[Fact]:
    """The facts behind the held-out rows, in their order."""
    shuffled = facts()
    random.Random(seed).shuffle(shuffled)
    return _choose_held_out(shuffled)


def _choose_held_out(shuffled: list[Fact]) -> list[Fact]:
    """Facts taken one a task in turn, at most a fifth of a task's table, until there are enough."""
    tables = [[fact for fact in shuffled if fact.relation is relation] for relation in RELATIONS]
    chosen: list[Fact] = []
    turn = 0
    while len(chosen) < HELD_OUT_ROWS:
        chosen += [table[turn] for table in tables if turn < len(table) // 5]
        turn += 1
    return chosen[:HELD_OUT_ROWS]


def _row(fact: Fact, rng: random.Random) -> dict[str, str]:
    with_input, alone = WORDINGS[fact.relation.name]
    if rng.random() < 0.7:
        return {"instruction": rng.choice(with_input), "input": fact.key, "output": fact.answer}
    return {"instruction": fill(rng.choice(alone), fact), "input": "", "output": fact.answer}
