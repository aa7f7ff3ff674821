"""evaluate --task=glue: its flags, and from the rows to the table."""

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from experiments.support.model_flags import ModelFlags

# flags defined in here belong to the command that calls
flags.disclaim_key_flags()


class GLUEFlags(NamedTuple):
    data: flags.FlagHolder
    task: flags.FlagHolder
    results: flags.FlagHolder


def glue_flags() -> GLUEFlags:
    """Defines the flags for the calling command."""
    return GLUEFlags(
        flags.DEFINE_string("glue_data", None, "rows of a task of GLUE; of several files (MNLI's two) with commas"),
        flags.DEFINE_string("glue_task", "", "cola, sst2, ...; as a folder or file is called by default"),
        flags.DEFINE_string("glue_results", None, "JSON files of --task=glue with commas: their mean over tasks"),
    )


def measure(
    own: GLUEFlags, model: ModelFlags, context: int | None, batch_size: int | None, out: Path | None
) -> dict[str, Any]:
    """The result, as it is written; beside `out` NAME.predictions.jsonl has every row's label and prediction."""
    from qlora_jax.data.glue.examples import as_label, tokenize_labelled
    from qlora_jax.data.glue.rows import read_rows
    from qlora_jax.data.glue.tasks import task_of
    from qlora_jax.data.read import data_files, data_sets
    from qlora_jax.errors import InputError
    from qlora_jax.evaluate.glue import score
    from qlora_jax.evaluate.glue.predict import logits_of
    from qlora_jax.files import write_text
    from qlora_jax.io.load import load_config
    from qlora_jax.models.roberta.encoder import Encoder, check_kind
    from qlora_jax.progress import Progress

    if (own.data.value is None) == (own.results.value is None):
        raise InputError("--task=glue takes one of --glue_data=FILE and --glue_results=FILE.json,FILE.json")
    if own.results.value is not None:
        return {"task": "glue", **score.over_tasks(_read(Path(name)) for name in own.results.value.split(","))}
    paths = data_sets(own.data.value)
    tasks = [task_of(own.task.value, path) for path in paths]
    if len({task.name for task in tasks}) > 1:
        raise InputError(f"--glue_data has rows of {' and '.join(task.name for task in tasks)}; an adapter is for one")
    task, config = tasks[0], load_config(model.folder())
    check_kind(config, encoder=True)
    longest = min(context or config.context, config.context)
    tokenizer, sets = model.tokenizer(), []
    torn: list[str] = []
    for path in paths:
        rows = list(read_rows(task, data_files(path), torn))
        sets.append((path, *tokenize_labelled(rows, tokenizer, task.classes, longest)))
    loaded = model.load(encoder=True)
    assert isinstance(loaded.model, Encoder)
    begun, found, lines = time.perf_counter(), [], []
    for path, examples, cut in sets:
        if cut:
            print(f"glue: {cut:,} of {len(examples):,} rows of {path} cut to {longest} tokens", file=sys.stderr)
        with Progress("classifying", unit="row") as classifying:
            logits = logits_of(loaded.model, examples, batch_size, classifying.to)
        said = score.predictions(task, logits)
        labels = [as_label(int(example.tokens[-1]), task.classes) for example in examples]
        found.append({"data": path, "examples": len(examples), **score.measured(task, said, _numbers(labels))})
        lines += [
            {"where": example.where, "label": _named(task, label), "prediction": _named(task, one), "logits": of_row}
            for example, label, one, of_row in zip(examples, labels, said.tolist(), logits.tolist(), strict=True)
        ]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(out.with_suffix(".predictions.jsonl"), text)
    return {
        "task": "glue",
        "glue_task": task.name,
        "quant": loaded.quant,
        "score": score.score(task, found),
        "sets": found,
        "left_out": len(torn),
        "seconds": round(time.perf_counter() - begun, 3),
        "model": model.model.value,
        "adapter": model.adapter.value,
    }


def _numbers(labels: list[float]) -> Any:
    import numpy as np

    return np.asarray(labels, np.float64)


def _named(task: Any, label: float) -> Any:
    """A class by its name, a number as it is."""
    return task.labels[int(label)] if task.labels else label


def _read(path: Path) -> dict[str, Any]:
    from qlora_jax.models.config import read_json

    return read_json(path.expanduser())


def table(result: dict[str, Any]) -> str:
    if "mean" in result:
        lines = [f"{name:8}{value:8.4f}  ({result['runs'][name]} runs)" for name, value in result["scores"].items()]
        return "\n".join([f"{'task':8}{'score':>8}", *lines, f"{'mean':8}{result['mean']:8.4f}"])
    lines = []
    for one in result["sets"]:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in one.items() if name not in ("data", "examples"))
        lines.append(f"{one['data']}: {one['examples']:,} rows, {figures}")
    return "\n".join([*lines, f"{result['glue_task']} ({result['quant']}): score {result['score']:.4f}"])
