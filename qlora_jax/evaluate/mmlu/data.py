"""MMLU's questions, in the forms they are kept in.

| form | what |
| --- | --- |
| the owners' folder | test/SUBJECT_test.csv, and so on, also under data/: question, A, B, C, D, answer; no header |
| a hub data set, or its folder | Parquet under all/ or SUBJECT/, as cais/mmlu: question, subject, choices, answer |
| a file | rows of the hub's fields, or of finished prompts {subject, input, output} |

Texts are taken as they stand. (The owners' own script reads them with pandas, which turns "NA" into nan.)
"""

import csv
import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.data import hub
from qlora_jax.data.read import read_rows
from qlora_jax.data.rows import Row
from qlora_jax.errors import InputError
from qlora_jax.evaluate.mmlu.subjects import SUBCATEGORIES
from qlora_jax.generate.prompting import read_text

LETTERS = "ABCD"
SPLITS = {"test": "test", "val": "validation", "dev": "dev"}  # the owners' name -> the hub's


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its four choices and the letter of the right one.

    `prompt` is the finished prompt where the file has it so; then question and choices are empty.
    """

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: str
    prompt: str = ""


@dataclasses.dataclass(frozen=True)
class Questions:
    """The questions of a split, subject after subject, and the subjects' dev questions, which are the shots."""

    asked: list[Question]
    shots: dict[str, list[Question]]


def load_questions(path: str, split: str = "test", shots: int = 5, revision: str = "main") -> Questions:
    """Reads a split, and where there are shots the dev questions.

    Args:
      path: a folder, a file, or a hub data set (owner/name, or owner/name:file); a file has no dev questions beside it
        and goes with shots = 0, or with as many as its finished prompts have.
      split: "test", "val" or "dev".
      shots: example questions before each, 0 to 5.
    Raises:
      InputError: nothing there, a file that cannot be read, a row that is no question, too few dev questions.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r} of MMLU; known: {', '.join(SPLITS)}")
    if shots < 0:
        raise InputError(f"MMLU shots are {shots}; expected 0 or more")
    folder = Path(path).expanduser()
    if folder.is_dir():
        found = _from_folder(folder, split, shots)
    elif not folder.is_file() and hub.looks_like_dataset(path) and ":" not in path:
        found = _from_hub(path, revision, split, shots)
    else:
        found = Questions(_check_file([_question(row) for row in read_rows(path, revision)], path, shots), {})
    for subject in {question.subject for question in found.asked if not question.prompt}:
        if len(there := found.shots.get(subject, [])) < shots:
            raise InputError(f"{path}: {len(there)} dev questions of {subject} for {shots} shots; ask for fewer shots")
    return found


def _from_folder(folder: Path, split: str, shots: int) -> Questions:
    for root in (folder, folder / "data"):
        if files := sorted((root / split).glob(f"*_{split}.csv")):
            subjects = [file.name.removesuffix(f"_{split}.csv") for file in files]
            dev = {s: _csv_questions(root / "dev" / f"{s}_dev.csv", s) for s in subjects} if shots else {}
            return Questions([q for file, s in zip(files, subjects, strict=True) for q in _csv_questions(file, s)], dev)
    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*.parquet"))]
    if not names:
        raise InputError(
            f"{folder} is no folder of MMLU: expected {split}/SUBJECT_{split}.csv in it, or Parquet files under all/"
        )
    return _from_parquet(str(folder), names, split, shots, lambda name: read_rows(str(folder / name)))


def _from_hub(repo: str, revision: str, split: str, shots: int) -> Questions:
    names = [name for name in hub.file_names(repo, revision) if name.endswith(".parquet")]
    return _from_parquet(repo, names, split, shots, lambda name: read_rows(f"{repo}:{name}", revision))


def _from_parquet(
    where: str, names: Sequence[str], split: str, shots: int, read: Callable[[str], list[Row]]
) -> Questions:
    asked = [_question(row) for name in _split_files(where, names, SPLITS[split]) for row in read(name)]
    by_subject: dict[str, list[Question]] = {}
    for name in _split_files(where, names, "dev") if shots else ():
        for row in read(name):
            question = _question(row)
            by_subject.setdefault(question.subject, []).append(question)
    return Questions(sorted(asked, key=lambda question: question.subject), by_subject)


def _split_files(where: str, names: Sequence[str], split: str) -> list[str]:
    """The files of a split: those of all subjects together, else one subject's after the other."""
    pattern = re.compile(rf"(?:(.*)/)?{split}(?:-\d{{5}}-of-\d{{5}}[^/]*)?\.parquet")
    found = {name: match[1] or "" for name in sorted(names) if (match := pattern.fullmatch(name))}
    files = [n for n, f in found.items() if f == "all"] or [n for n, f in found.items() if f in SUBCATEGORIES]
    files = files or list(found)
    if not files:
        raise InputError(
            f"{where} has no Parquet file of the split {split!r}, such as all/{split}-00000-of-00001.parquet"
        )
    return files


def _check_file(questions: list[Question], path: str, shots: int) -> list[Question]:
    """Finished prompts have the shots that were asked for, or all have none."""
    for number, question in enumerate(questions, 1):
        written = max(question.prompt.count("\nAnswer:") - 1, 0)
        if question.prompt and written != shots:
            raise InputError(f"{path}, row {number}: a finished prompt with {written} shots; say --shots={written}")
        if not question.prompt and shots:
            raise InputError(
                f"{path} is one file and has no dev questions for {shots} shots: say --shots=0, or give a folder"
            )
    return sorted(questions, key=lambda question: question.subject)


def _csv_questions(file: Path, subject: str) -> list[Question]:
    text = read_text(file)
    if not text.strip():
        raise InputError(f"{file} is empty; expected lines of question, A, B, C, D, answer")
    rows, begins, questions = csv.reader(io.StringIO(text, newline=""), strict=True), 1, []
    try:
        for fields in rows:
            where, begins = f"{file}, line {begins}", rows.line_num + 1
            if not fields:
                continue
            if len(fields) != 6:
                raise InputError(f"{where}: {len(fields)} fields; expected 6: question, A, B, C, D, answer")
            questions.append(_made(where, subject, fields[0], fields[1:5], fields[5]))
    except csv.Error as error:
        raise InputError(f"{file}, line {begins}: {error}") from error
    return questions


def _question(row: Row) -> Question:
    fields = row.fields
    if {"subject", "input", "output"} <= set(fields):
        prompt, answer = fields["input"], fields["output"]
        if not isinstance(prompt, str) or not prompt.endswith("\nAnswer:"):
            raise InputError(
                f'{row.where}: the field input is no prompt of MMLU: expected a text that ends in "Answer:"'
            )
        return _made(
            row.where, fields["subject"], "", (), answer.strip() if isinstance(answer, str) else answer, prompt
        )
    missing = [name for name in ("question", "subject", "choices", "answer") if name not in fields]
    if missing:
        raise InputError(
            f"{row.where}: no field {', '.join(missing)}; expected question, subject, choices, answer, or subject, "
            f"input, output; found {', '.join(map(str, list(fields)[:12])) or 'none'}"
        )
    answer = fields["answer"]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(LETTERS):
        answer = LETTERS[answer]
    return _made(row.where, fields["subject"], fields["question"], fields["choices"], answer)


def _made(where: str, subject: Any, question: Any, choices: Any, answer: Any, prompt: str = "") -> Question:
    if subject not in SUBCATEGORIES:
        raise InputError(f"{where}: {subject!r} is none of MMLU's 57 subjects (such as abstract_algebra)")
    if not prompt:
        if not isinstance(question, str) or not isinstance(choices, list | tuple):
            raise InputError(f"{where}: expected a question as text and its choices as a list")
        if len(choices) != len(LETTERS) or not all(isinstance(choice, str) for choice in choices):
            raise InputError(f"{where}: {len(choices)} choices; expected {len(LETTERS)} texts")
    if not isinstance(answer, str) or answer not in tuple(LETTERS):
        raise InputError(f"{where}: the answer is {answer!r}; expected A, B, C or D")
    return Question(subject, question, tuple(choices), answer, prompt)
