"""evaluate --task=rouge: ROUGE-L of a model's answers, to Super-NaturalInstructions or to one's own rows."""

import dataclasses
import sys
import time
from typing import Any, NamedTuple

from absl import flags

from experiments.support.model_flags import ModelFlags

# flags defined in here belong to the command that calls
flags.disclaim_key_flags()

_SHOWN = 20  # tasks in the table


class RougeFlags(NamedTuple):
    data: flags.FlagHolder
    source_len: flags.FlagHolder
    new_tokens: flags.FlagHolder
    questions: flags.FlagHolder


def rouge_flags() -> RougeFlags:
    """Defines the flags for the calling command."""
    return RougeFlags(
        flags.DEFINE_string("rouge_data", None, "test_tasks.txt of Super-NaturalInstructions, or rows {input, output}"),
        flags.DEFINE_integer("source_len", 1024, "tokens of a prompt at most, for --task=rouge", lower_bound=2),
        flags.DEFINE_integer("new_tokens", 128, "tokens of an answer at most, for --task=rouge", lower_bound=1),
        flags.DEFINE_integer("rouge_questions", 0, "only the first of each task; 0 asks all", lower_bound=0),
    )


def measure(own: RougeFlags, model: ModelFlags, batch_size: int | None) -> dict[str, Any]:
    """The result, as it is written."""
    from qlora_jax.api.opening import eos_ids
    from qlora_jax.errors import InputError
    from qlora_jax.evaluate.rouge.questions import read_questions
    from qlora_jax.evaluate.rouge.tasks import answers, scores
    from qlora_jax.progress import Progress

    if not own.data.value:
        raise InputError("--task=rouge takes --rouge_data=FILE, such as splits/default/test_tasks.txt")
    questions = read_questions(own.data.value, own.questions.value)
    count = len({question.task for question in questions})
    print(f"rouge: {len(questions):,} questions of {count:,} tasks", file=sys.stderr)
    tokenizer, loaded = model.tokenizer(), model.load()
    begun = time.perf_counter()
    with Progress("answering", unit="answer") as answering:
        given = answers(
            loaded.model, tokenizer, questions, eos_ids(loaded.model, tokenizer), own.source_len.value,
            own.new_tokens.value, batch_size or 16, answering.to,
        )  # fmt: skip
    overall, tasks = scores(questions, given)
    return {
        "task": "rouge",
        "quant": loaded.quant,
        **dataclasses.asdict(overall),
        "tasks": {name: dataclasses.asdict(mean) for name, mean in tasks.items()},
        "source_len": own.source_len.value,
        "new_tokens": own.new_tokens.value,
        "seconds": round(time.perf_counter() - begun, 3),
        "model": model.model.value,
        "adapter": model.adapter.value,
        "data": own.data.value,
    }


def table(result: dict[str, Any]) -> str:
    from qlora_jax.evaluate.tables import as_text

    named = list(result["tasks"].items())
    shown = [*(named if len(named) <= _SHOWN else []), ("all", result)]
    rows = [(name, f"{of['questions']:,}", f"{of['rouge_l']:.2f}", f"{of['exact_match']:.2f}") for name, of in shown]
    return as_text(("task", "questions", "ROUGE-L", "exact match"), rows)
