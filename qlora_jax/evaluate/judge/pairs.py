"""What is judged: questions, the answers of systems to them, and the pairs of answers in their orders.

questions  JSONL {question_id, text or turns: [text], category}: the Vicuna and OA benchmarks as they were released
answers    JSONL, one system a file: {question_id, text, model_id} (released answers; what `generate` writes),
           {question_id, generation} beside the question as `text` (released generations), or
           {question_id, model_id, choices: [{turns: [text]}]} (FastChat today)
"""

import dataclasses
import random
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from qlora_jax.data.read import read_rows
from qlora_jax.data.rows import Problems, Row
from qlora_jax.errors import InputError

ORDERS = ("both", "first", "random")


@dataclasses.dataclass(frozen=True)
class Question:
    item: int | str
    text: str
    category: str  # "" where the file has none


@dataclasses.dataclass(frozen=True)
class Answers:
    name: str  # of the system
    texts: dict[str, str]  # by question, as text


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One request to a judge: `first`'s answer stands before `second`'s."""

    question: Question
    first: str
    second: str
    answer_1: str
    answer_2: str

    @property
    def key(self) -> tuple[str, str, str]:
        return str(self.question.item), self.first, self.second


def read_questions(path: Path) -> list[Question]:
    """All questions of a file, in its order.

    Raises InputError for a broken file, a row without id or text, several turns, or an id that comes twice.
    """
    questions: dict[str, Question] = {}
    problems = Problems()
    for row in read_rows(str(path)):
        item, text = _item(row), row.fields.get("text")
        turns = row.fields.get("turns")
        if text is None and isinstance(turns, list):
            if len(turns) != 1:
                problems.add(f"{row.where}: {len(turns)} turns; expected one question to judge a single answer by")
                continue
            text = turns[0]
        if item is None or not isinstance(text, str):
            found = ", ".join(map(str, row.fields))
            problems.add(f"{row.where}: found the fields {found}; expected question_id, text (or turns) and category")
        elif str(item) in questions:
            problems.add(f"{row.where}: question {item} comes a second time")
        else:
            questions[str(item)] = Question(item, text, str(row.fields.get("category") or ""))
    problems.raise_if_any()
    return list(questions.values())


def read_answers(given: str) -> Answers:
    """The answers of one system.

    Args:
      given: a file, or NAME=FILE to name the system. Else its name is the rows' model_id, or the file's own without
        what released files are named by ("answer_", "-vicuna-generations-...").
    Raises:
      InputError: a broken file, a row without question or answer, a question answered twice, or several systems in it.
    """
    name, path = _split(given)
    rows = read_rows(str(path))
    models = {str(row.fields["model_id"]) for row in rows if row.fields.get("model_id")}
    if len(models) > 1 and not name:
        raise InputError(f"{path}: answers of several systems, {', '.join(sorted(models)[:4])}; expected one in a file")
    stem = path.name.removesuffix(".gz").rpartition(".")[0]
    plain = re.sub(r"^answer[-_]|-(vicuna|oa)(-generations.*)?$", "", stem)
    texts: dict[str, str] = {}
    problems = Problems()
    for row in rows:
        item, text = _item(row), _answer(row)
        if item is None or text is None:
            found = ", ".join(map(str, row.fields))
            problems.add(f"{row.where}: found the fields {found}; expected question_id and text (or generation)")
        elif str(item) in texts:
            problems.add(f"{row.where}: a second answer to question {item}")
        else:
            texts[str(item)] = text
    problems.raise_if_any()
    return Answers(name or (models.pop() if models else plain), texts)


def compare(
    questions: Sequence[Question],
    systems: Sequence[Answers],
    orders: str = "both",
    baseline: str | None = None,
    partial: bool = False,
    seed: int = 0,
) -> list[Comparison]:
    """Every comparison, question by question.

    Args:
      systems: in the order of the command line: of a pair the earlier one comes first.
      orders: "both"; "first": the earlier system's answer before the other's; "random": one order a pair and question,
        drawn from the seed and their names alone, so that it stays when others are added.
      baseline: name of the system that all others are compared with; None compares all pairs.
      partial: pass over questions that one of the two has not answered; else that is an error.
    Raises:
      InputError: fewer than two systems, equal names, an unknown baseline, missing answers, or nothing to compare.
    """
    names = [system.name for system in systems]
    if len(set(names)) < len(names):
        raise InputError(f"two files of answers are of {_twice(names)}; name them apart: --answers=NAME=FILE")
    if len(names) < 2:
        raise InputError(f"answers of {len(names)} system; expected at least two: repeat --answers=FILE")
    if baseline is not None and baseline not in names:
        raise InputError(f"--baseline={baseline}: no such system; the answers are of {', '.join(names)}")
    if not partial:
        for system in systems:
            missing = [str(question.item) for question in questions if str(question.item) not in system.texts]
            if missing:
                raise InputError(
                    f"{system.name}: no answer to question {missing[0]} ({len(missing)} of {len(questions)} missing); "
                    "--partial judges the questions that both of a pair have answered"
                )
    pairs = [pair for pair in combinations(systems, 2) if baseline is None or baseline in (pair[0].name, pair[1].name)]
    found = []
    for question in questions:
        for pair in pairs:
            if all(str(question.item) in system.texts for system in pair):
                found += [_comparison(question, *ordered) for ordered in _ordered(question, pair, orders, seed)]
    if not found:
        raise InputError("no question that two systems have answered: are the answers of these questions?")
    return found


def check_known(questions: Sequence[Question], system: Answers) -> None:
    """Raises InputError where a system answers what was not asked: the wrong file of questions, mostly."""
    unknown = list(system.texts.keys() - {str(question.item) for question in questions})
    if unknown:
        raise InputError(
            f"{system.name} answers question {min(unknown)}, which the file of questions has not "
            f"({len(unknown)} of {len(system.texts)} answers)"
        )


def _ordered(
    question: Question, pair: tuple[Answers, Answers], orders: str, seed: int
) -> list[tuple[Answers, Answers]]:
    turned = pair[1], pair[0]
    if orders == "both":
        return [pair, turned]
    names = "/".join(sorted(system.name for system in pair))
    ordered_by_name = pair if pair[0].name < pair[1].name else turned
    if orders == "random":
        draw = random.Random(f"{seed}/{question.item}/{names}").random() < 0.5
        return [ordered_by_name if draw else (ordered_by_name[1], ordered_by_name[0])]
    return [pair]


def _comparison(question: Question, first: Answers, second: Answers) -> Comparison:
    item = str(question.item)
    return Comparison(question, first.name, second.name, first.texts[item], second.texts[item])


def _split(given: str) -> tuple[str, Path]:
    path = Path(given).expanduser()
    name, separator, rest = given.partition("=")
    if path.exists() or not separator:
        return "", path
    if not name.strip():
        raise InputError(f"--answers={given}: the name before = is empty")
    return name.strip(), Path(rest).expanduser()


def _item(row: Row) -> int | str | None:
    item = row.fields.get("question_id")
    return item if isinstance(item, int | str) and not isinstance(item, bool) and item != "" else None


def _answer(row: Row) -> str | None:
    fields = row.fields
    text = fields.get("generation", fields.get("text"))
    choices = fields.get("choices")
    if text is None and isinstance(choices, list) and choices and isinstance(choices[0], dict):
        turns = choices[0].get("turns")
        text = turns[0] if isinstance(turns, list) and len(turns) == 1 else None
    return text if isinstance(text, str) else None


def _twice(names: Sequence[str]) -> str:
    return next(name for place, name in enumerate(names) if name in names[:place])
