"""Small MMLU data in every form that it is kept in."""

import csv
import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet

from tests.tiny_checkpoint import write_tiny_checkpoint

EMBEDDED = Path(__file__).resolve().parents[3] / "assets" / "tiny_llama"  # its tokenizer has " A" to " D"
SUBJECTS = ("anatomy", "college_physics", "world_religions")
COUNTS = {"dev": 5, "val": 3, "test": 4}


def rows(subject: str, split: str) -> list[dict]:
    """Rows in the hub's fields; every second question has a line break, a comma and quotation marks."""
    made = []
    for number in range(COUNTS[split]):
        question = f"What is {subject} {number}?" if number % 2 else f'Of {subject},\nsay "{split} {number}":'
        choices = [f"{letter} {number}" for letter in ("one", "two", "three", "four")]
        made.append({"question": question, "subject": subject, "choices": choices, "answer": (number * 7 + 1) % 4})
    return made


def write_checkpoint(folder: Path, context: int = 512) -> Path:
    """A random Llama with the quickstart's tokenizer."""
    write_tiny_checkpoint(folder, context, V=1024)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / name, folder / name)
    return folder


def write_owners_folder(folder: Path) -> Path:
    """dev/, val/ and test/ with a CSV of each subject."""
    for split in COUNTS:
        (folder / split).mkdir(parents=True)
        for subject in SUBJECTS:
            with (folder / split / f"{subject}_{split}.csv").open("w", encoding="utf-8", newline="") as file:
                for row in rows(subject, split):
                    csv.writer(file).writerow([row["question"], *row["choices"], "ABCD"[row["answer"]]])
    return folder


def write_parquet_folder(folder: Path) -> Path:
    """all/ as cais/mmlu has it, and one subject's own folder, which must not be read twice."""
    for split, name in (("dev", "dev"), ("val", "validation"), ("test", "test")):
        everything = [row for subject in SUBJECTS for row in rows(subject, split)]
        for place, content in (("all", everything), ("anatomy", rows("anatomy", split))):
            (folder / place).mkdir(parents=True, exist_ok=True)
            table = pyarrow.Table.from_pylist(content)
            pyarrow.parquet.write_table(table, folder / place / f"{name}-00000-of-00001.parquet")
    return folder


def write_prompts(file: Path, subjects: tuple[str, ...] = SUBJECTS) -> Path:
    """Finished zero-shot prompts, a JSON object a line."""
    lines = []
    for subject in subjects:
        for row in rows(subject, "val"):
            choices = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True))
            head = f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}.\n\n"
            prompt = f"{head}{row['question']}{choices}\nAnswer:"
            lines.append(json.dumps({"subject": subject, "input": prompt, "output": "ABCD"[row["answer"]]}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
