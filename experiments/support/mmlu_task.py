"""evaluate --task=mmlu: its flags, and from the data to the table.

Answers are kept in NAME.questions.jsonl beside --out=NAME.json as they come: the same command goes on after a kill.
"""

import hashlib
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from experiments.support.model_flags import ModelFlags

if TYPE_CHECKING:
    from qlora_jax.evaluate.answer_record import AnswerRecord
    from qlora_jax.evaluate.mmlu.data import Question
    from qlora_jax.evaluate.mmlu.prompts import Prompts

# flags defined in here belong to the command that calls
flags.disclaim_key_flags()


class MMLUFlags(NamedTuple):
    data: flags.FlagHolder
    shots: flags.FlagHolder
    split: flags.FlagHolder


def mmlu_flags() -> MMLUFlags:
    """Defines the flags for the calling command."""
    return MMLUFlags(
        flags.DEFINE_string("mmlu_data", None, "the owners' folder, a hub data set (cais/mmlu), or one file"),
        flags.DEFINE_integer("shots", 5, "example questions before each question of MMLU"),
        flags.DEFINE_enum("split", "test", ["test", "val", "dev"], "questions of MMLU that are asked"),
    )


def measure(
    own: MMLUFlags, model: ModelFlags, context: int | None, batch_size: int | None, out: Path | None
) -> dict[str, Any]:
    """The result, as it is written."""
    from tqdm import tqdm

    from qlora_jax.errors import InputError
    from qlora_jax.evaluate.answer_record import AnswerRecord
    from qlora_jax.evaluate.mmlu import accuracy as mmlu
    from qlora_jax.evaluate.mmlu.data import load_questions
    from qlora_jax.evaluate.mmlu.prompts import fitting, make_prompts
    from qlora_jax.evaluate.scoring import option_logits_of
    from qlora_jax.io.load import load_config

    if not own.data.value:
        raise InputError("--task=mmlu takes --mmlu_data=DIR, FILE or hub name")
    questions = load_questions(own.data.value, own.split.value, own.shots.value)
    folder = model.folder()
    config = load_config(folder)
    limit = config.context if context is None else context
    prompts = make_prompts(questions, own.shots.value, model.tokenizer(), limit, model.vocabulary())
    print(f"mmlu: {len(questions.asked):,} questions, {own.shots.value} shots; {fitting(prompts)}", file=sys.stderr)
    settings = {
        "shots": own.shots.value,
        "split": own.split.value,
        "context": limit,
        "prompts": _prompts_hash(questions.asked, prompts),
        "model": model.model.value,
        "model_files": _files_hash(folder, contents=False),
        "adapter_files": _files_hash(Path(model.adapter.value), contents=True) if model.adapter.value else None,
        "quant": model.quant.value,
        "block_size": model.block_size.value,
        "compute_dtype": model.compute_dtype.value,
    }
    record = None if out is None else AnswerRecord(out.with_suffix(".questions.jsonl"), settings)
    known = _known(record, len(questions.asked))
    if known and record is not None:
        print(f"mmlu: {len(known):,} answers are already in {record.path}", file=sys.stderr)
    loaded = model.load()
    started = time.perf_counter()
    with tqdm(total=len(questions.asked), initial=len(known), desc="asking", unit="question", delay=2) as bar:

        def progress(done: int, total: int) -> None:
            bar.update(done - bar.n)

        def keep(answered: dict[int, list[float]]) -> None:
            if record is not None:
                record.add([_line(questions.asked[number], number, row) for number, row in answered.items()])

        logits = mmlu.answer(option_logits_of(loaded.model), prompts, batch_size, known, keep, progress)
    if record is not None:
        record.close()
    return {
        "task": "mmlu",
        "quant": loaded.quant,
        "shots": own.shots.value,
        "split": own.split.value,
        **mmlu.results(questions.asked, logits),
        "shortened_prompts": prompts.shortened,
        "cut_prompts": prompts.cut,
        "context": limit,
        "answer_tokens": prompts.options,
        "seconds": round(time.perf_counter() - started, 3),
        "model": model.model.value,
        "adapter": model.adapter.value,
        "data": own.data.value,
    }


def table(result: dict[str, Any]) -> str:
    """Every subject, the categories, both means."""
    from qlora_jax.evaluate.mmlu.subjects import category
    from qlora_jax.evaluate.tables import as_text

    def row(name: str, group: str, of: dict[str, Any]) -> list[str]:
        return [name, group, *(f"{of[key]:.1%}" for key in ("accuracy", "low", "high")), f"{of['questions']:,}"]

    rows = [row(name, category(name), of) for name, of in result["subjects"].items()]
    rows += [row(name, "", of) for name, of in result["categories"].items()]
    for name, key in (("mean over subjects", "accuracy_subjects"), ("mean over questions", "accuracy_questions")):
        low, high = result[f"{key}_interval"]
        rows.append(row(name, "", {**result, "accuracy": result[key], "low": low, "high": high}))
    return as_text(("subject", "category", "accuracy", "95% from", "to", "questions"), rows)


def _line(question: "Question", number: int, logits: list[float]) -> dict[str, Any]:
    chosen = "ABCD"[logits.index(max(logits))]
    line = {"question": number, "subject": question.subject, "answer": question.answer, "chosen": chosen}
    return line | {"logits": logits}


def _known(record: "AnswerRecord | None", count: int) -> dict[int, list[float]]:
    """Question -> logits, of the lines that a record has."""
    from qlora_jax.errors import InputError

    known: dict[int, Any] = {}
    for line in () if record is None else record.lines:
        number, logits = line.get("question"), line.get("logits")
        if not isinstance(number, int) or not 0 <= number < count or not _is_answer(logits):
            assert record is not None
            raise InputError(f"{record.path} has a line that is no answer; delete the file to ask again")
        known[number] = logits
    return known


def _is_answer(logits: Any) -> bool:
    """Four finite numbers, as mmlu.answer gives them: the largest of anything else would be no choice."""
    if not isinstance(logits, list) or len(logits) != 4:
        return False
    return all(isinstance(logit, int | float) and math.isfinite(logit) for logit in logits)


def _prompts_hash(questions: "list[Question]", prompts: "Prompts") -> str:
    """SHA-256 of everything that is asked, and of the right answers."""
    digest = hashlib.sha256(repr(prompts.options).encode())
    for question, ids in zip(questions, prompts.ids, strict=True):
        digest.update(repr((question.subject, question.answer, ids)).encode())
    return digest.hexdigest()


def _files_hash(folder: Path, contents: bool) -> str | None:
    """SHA-256 of a folder's weight files: of their bytes, or (many gigabytes) of names and sizes. None if not local."""
    if not isinstance(folder, Path) or not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        if contents:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
