"""Runs of encoders: what a config cannot ask of one, and how many classes its data have."""

import dataclasses
from typing import Any

from qlora_jax.data.glue.tasks import FORMAT, Task, task_of
from qlora_jax.errors import InputError
from qlora_jax.feed.sources import heldout_sources, sources_of
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.config import ModelConfig

REMATS = ("block", "none", "auto")


def with_labels(lora_config: LoRAConfig, config: Any, sizes: ModelConfig) -> LoRAConfig:
    """The adapter's config, of an encoder with the classes of the config's data.

    Raises InputError where model and data are of different kinds, or the config asks of an encoder what it cannot do.
    """
    sources = sources_of(config.data) if config.data.path and not config.data.batches else []
    labelled = [source.path for source in sources if source.format == FORMAT]
    if sizes.kind.bidirectional is None:
        if labelled:
            raise InputError(
                f"data.format is {FORMAT}, whose rows have labels ({labelled[0]}), and the model is a decoder: name an "
                "encoder such as RoBERTa, or data with answers"
            )
        if config.data.task:
            raise InputError(f"data.task is {config.data.task!r}, which is for data.format={FORMAT}")
        return lora_config
    if not sources or len(labelled) < len(sources):
        found = f"data.format is {config.data.format!r}"
        if not sources:
            found = "data.batches is a file of ready rows" if config.data.batches else "data.path is empty"
        raise InputError(
            f"the model is an encoder (RoBERTa), which learns rows with labels, and {found}: set data.format={FORMAT}"
        )
    _check_section(config)
    tasks = {task.name: task for task in tasks_of(config.data)}
    if len({task.labels for task in tasks.values()}) > 1:
        raise InputError(f"one head has the labels of one task, and the data sets are {' and '.join(tasks)}")
    return dataclasses.replace(lora_config, labels=next(iter(tasks.values())).classes)


def tasks_of(data: Any) -> list[Task]:
    """The task of each data set, of those to train on and those held out."""
    sources = [*sources_of(data), *(heldout_sources(data) if data.eval_path else [])]
    return [task_of(data.task, source.path) for source in sources]


def longest_labelled_row(data: Any, sizes: ModelConfig) -> int:
    """Tokens of the longest row that a config allows, its label counted."""
    return (data.max_source_len or sizes.context) + 1


def _check_section(config: Any) -> None:
    """Raises InputError for what goes with decoders alone."""
    refused = {
        "model.attention": (config.model.attention in ("auto", "xla"), "an encoder's attention is xla's: set auto"),
        "model.sequence_chunk": (not config.model.sequence_chunk, "rows go through an encoder whole: set 0"),
        "model.remat": (config.model.remat in REMATS, f"of an encoder it is {', '.join(REMATS)}"),
        "lora.modules_to_save": (
            tuple(config.lora.modules_to_save) in ((), ("auto",)),
            "of an encoder the head trains whole, and nothing else: set auto",
        ),
        "data.template": (config.data.template != "chat", "rows with labels have no chat template: set auto"),
        "data.turns": (config.data.turns == "all", "rows with labels have no turns: set all"),
        "data.packing": (not config.data.packing, "an encoder's rows are not packed: set False"),
        "data.train_on_source": (not config.data.train_on_source, "an encoder learns labels alone: set False"),
        "data.added_tokens": (not config.data.added_tokens, "no tokens are added for an encoder"),
        "data.added_special_tokens": (not config.data.added_special_tokens, "no tokens are added for an encoder"),
        "eval.mmlu_data": (not config.eval.mmlu_data, "an encoder answers no questions"),
    }
    for key, (is_right, mend) in refused.items():
        if not is_right:
            section, _, name = key.partition(".")
            raise InputError(f"{key} is {config[section][name]!r}, and the model is an encoder (RoBERTa): {mend}")
