"""What the small model is pretrained on: generated statements of facts, and docstrings of the standard library.

The generated part states every fact of `facts.py` many times in varied plain forms: lessons, lists, quizzes, talks,
records, portraits of one word. It never uses an instruction prompt, so that what finetuning adds is the form and not
the fact. The other part is English that every Python installation carries: it is read from source files with `ast`,
nothing is imported.
"""

import ast
import codecs
import keyword
import pathlib
import random
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterator

from experiments.support.embedded import words
from experiments.support.embedded.facts import FRESH, RELATIONS, Fact, capital, facts, fill

_NAMES = words.NAMES.split()
_ADULTS = (
    "the teacher", "her mother", "his father", "the old man", "her aunt", "his uncle", "the wise owl", "grandmother",
)  # fmt: skip
_OPENINGS = (
    "Here is what we learned today.", "Let us remember some things.", "The teacher wrote on the board.",
    "{n} had a small book of facts.", "{n} told the others what she knew.", "These things are true.",
    "One day {n} sat under a tree and thought.", "It was a quiet day at school.", "Before bed, {n} said it all again.",
)  # fmt: skip
_FOLLOW_UPS = (
    "That is right.", "Well done!", "Everybody knows that.", "{n} wrote it down.", "It is easy to remember.",
    "So it is.", "\"I knew it,\" said {n}.", "\"Now I know,\" said {n}.", "{n} nodded.",
)  # fmt: skip
_TALKS = (
    "\"{q}\" asked {n}.\n\"{A},\" said {m}.",
    "{n} asked {p}, \"{q}\"\n\"{A}!\" said {p}. \"{s}\"",
    "\"{q}\" said {p}.\n{n} thought for a while. \"{a}\"",
    "{n} did not know the answer. \"{q}\" {m} knew it: {a}.",
    "\"I have a question, {n}. {q}\"\n\"That is easy. {A}.\"",
    "{p} looked at {n}. \"{q}\"\n\"I think it is {a},\" said {n}.\n\"Yes, {a},\" said {p}.",
    "{q} {n} knows: {a}.",
    "{n}: {q}\n{m}: {a}",
)  # fmt: skip
_QUIZ = ("Q: {q}\nA: {a}", "{q}\n{a}", "{q} {A}.", "{q} The answer is {a}.", "Question: {q} Answer: {a}.", "{q} {a}")
_LIST = ("{k}: {a}", "{k} - {a}", "{k} -> {a}", "{k} = {a}", "{k}, {a}", "{k}\n{a}", "{k}\t{a}", "{k} ... {a}")
_RECORD = (
    "{kl}: {k}\n{al}: {a}", "{kl}: {k}. {al}: {a}.", "{kl} {k}, {al} {a}", "{al} of {k}: {a}", "{kl}:\n{k}\n{al}:\n{a}",
    "The {al} for this {kl}.\n{k}\nIt is:\n{a}", "{k}\n{al}: {a}", "({kl}) {k} ({al}) {a}",
    "Look for the {al}.\n\n{k}\n\n{a}", "{al}?\n{kl}: {k}\n\n{a}",
)  # fmt: skip
_SKIPPED = {
    "test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "ensurepip", "__pycache__", "encodings",
}  # fmt: skip

_Writer = Callable[[random.Random, list[Fact]], str]


def documents(seed: int, rounds: int = 6) -> list[str]:
    """The generated documents, the same for the same seed.

    Args:
        seed: chooses wordings, order and the examples of rules that are made afresh.
        rounds: how often each kind of document goes through all the facts, which states each at least 7 * rounds times.
    """
    rng = random.Random(seed)
    found: list[str] = []
    for _ in range(rounds):
        found += _by_relation(rng, 6, _lesson)
        found += _by_relation(rng, 10, _list)
        found += _mixed(rng, 8, _lesson)
        found += _mixed(rng, 5, _talk)
        found += _mixed(rng, 10, _quiz)
        found += _mixed(rng, 8, _record)
        found += _portraits(rng)
    return found


def _pool(rng: random.Random) -> list[Fact]:
    """All facts, and for relations that are rules twice as many new examples."""
    pool = facts()
    for relation in RELATIONS:
        if relation.fresh:
            pool += [Fact(relation, *FRESH[relation.name](rng)) for _ in range(2 * len(relation.pairs))]
    rng.shuffle(pool)
    return pool


def _chunks(items: list[Fact], size: int) -> Iterator[list[Fact]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _mixed(rng: random.Random, size: int, write: _Writer) -> list[str]:
    return [write(rng, chunk) for chunk in _chunks(_pool(rng), size)]


def _by_relation(rng: random.Random, size: int, write: _Writer) -> list[str]:
    groups: dict[str, list[Fact]] = defaultdict(list)
    for fact in _pool(rng):
        groups[fact.relation.name].append(fact)
    return [write(rng, chunk) for group in groups.values() for chunk in _chunks(group, size)]


def _name(rng: random.Random, text: str) -> str:
    return text.replace("{n}", rng.choice(_NAMES))


def _lesson(rng: random.Random, chunk: list[Fact]) -> str:
    parts = [_name(rng, rng.choice(_OPENINGS))] if rng.random() < 0.5 else []
    for fact in chunk:
        parts.append(fill(rng.choice(fact.relation.statements), fact))
        if rng.random() < 0.12:
            parts.append(_name(rng, rng.choice(_FOLLOW_UPS)))
    return rng.choice((" ", " ", "\n")).join(parts)


def _list(rng: random.Random, chunk: list[Fact]) -> str:
    line, relation = rng.choice(_LIST), chunk[0].relation
    lines = [line.format(k=fact.key, a=fact.answer) for fact in chunk]
    return "\n".join([rng.choice((relation.heading, relation.heading + ":", relation.answer_label + ":")), *lines])


def _talk(rng: random.Random, chunk: list[Fact]) -> str:
    parts = [_name(rng, rng.choice(_OPENINGS))] if rng.random() < 0.3 else []
    for fact in chunk:
        first, second = rng.sample(_NAMES, 2)
        text = rng.choice(_TALKS).format(
            q=fill(rng.choice(fact.relation.questions), fact),
            s=fill(rng.choice(fact.relation.statements), fact),
            a=fact.answer,
            A=capital(fact.answer),
            n=first,
            m=second,
            p=rng.choice(_ADULTS),
        )
        parts.append(capital(text))
    return "\n".join(parts)


def _quiz(rng: random.Random, chunk: list[Fact]) -> str:
    form = rng.choice(_QUIZ)
    asked = [(fill(rng.choice(fact.relation.questions), fact), fact.answer) for fact in chunk]
    return rng.choice(("\n", "\n\n")).join(form.format(q=q, a=a, A=capital(a)) for q, a in asked)


def _record(rng: random.Random, chunk: list[Fact]) -> str:
    form, small = rng.choice(_RECORD), rng.random() < 0.5
    lines = []
    for fact in chunk:
        labels = (fact.relation.key_label, fact.relation.answer_label)
        key_label, answer_label = (label.lower() for label in labels) if small else labels
        lines.append(form.format(kl=key_label, al=answer_label, k=fact.key, a=fact.answer))
    return "\n\n".join(lines)


def _portraits(rng: random.Random) -> list[str]:
    """For each key, one text of all that is known of it; short ones share a document."""
    known: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts():
        known[fact.key].append(fact)
    keys = list(known)
    rng.shuffle(keys)
    texts, text = [], ""
    for key in keys:
        rng.shuffle(known[key])
        said = " ".join(fill(rng.choice(fact.relation.statements), fact) for fact in known[key])
        text = f"{text}\n\n{capital(key)}. {said}" if text else f"{capital(key)}. {said}"
        if len(text) > 350:
            texts.append(text)
            text = ""
    return [*texts, text] if text else texts


def stdlib_documents(limit_bytes: int = 1_100_000, seed: int = 0) -> list[str]:
    """English from the running Python's standard library: module docstrings, help topics, the Zen of Python, keywords.

    Args:
        limit_bytes: stop when so many UTF-8 bytes are collected.
        seed: the order in which modules are taken.

    Returns:
        Documents of at most some 1,500 characters. The exact text depends on the Python version.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    sources = sorted(_sources(root))
    random.Random(seed).shuffle(sources)
    found: list[str] = []
    total = 0
    for text in _stdlib_texts(root, sources):
        total += len(text.encode())
        if total > limit_bytes:
            break
        found.append(text)
    return found


def _sources(root: pathlib.Path) -> Iterator[pathlib.Path]:
    for folder, folders, files in root.walk():
        folders[:] = set(folders) - _SKIPPED  # not walked: site-packages may be large
        yield from (folder / name for name in files if name.endswith(".py"))


def _stdlib_texts(root: pathlib.Path, sources: list[pathlib.Path]) -> Iterator[str]:
    yield "The keywords of Python are: " + ", ".join(keyword.kwlist) + "."
    yield from _special(root)
    for path in sources:
        yield from _module_documents(path)


def _special(root: pathlib.Path) -> list[str]:
    """The Zen of Python and the prose of the help topics, where this installation has them."""
    found = []
    for name in ("this.py", "pydoc_data/topics.py"):
        for literal in _strings(root / name):
            text = codecs.decode(literal, "rot13") if name == "this.py" else literal
            found += _pieces(text) if len(text) > 200 else []
    return found[:250]


def _strings(path: pathlib.Path) -> list[str]:
    tree = _parse(path)
    nodes = ast.walk(tree) if tree else ()
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def _parse(path: pathlib.Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None


def _module_documents(path: pathlib.Path) -> list[str]:
    tree = _parse(path)
    if tree is None:
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    prose = [text for text in docstrings if len(text) >= 60 and _is_prose(text)]
    return _pieces("\n\n".join(prose)) if prose else []


def _is_prose(text: str) -> bool:
    return text.isascii() and sum(c.isalpha() or c.isspace() for c in text) > 0.85 * len(text)


def _pieces(text: str, size: int = 1_500) -> list[str]:
    """`text` cut at paragraph ends into pieces of about `size` characters, without what is no prose."""
    pieces, piece = [], ""
    for paragraph in text.split("\n\n"):
        if not paragraph.strip() or not _is_prose(paragraph):
            continue
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
        if len(piece) >= size:
            pieces.append(piece)
            piece = ""
    return [*pieces, piece] if piece else pieces
