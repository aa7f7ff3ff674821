"""The head over classes in a PEFT folder for an encoder (task_type SEQ_CLS, "classifier" in modules_to_save)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.errors import InputError
from qlora_jax.io.adapters.tensors import PREFIX, WEIGHTS, Tensors, head_keys
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.roberta import WITH_HEAD
from qlora_jax.models.roberta.names import head_shapes


def read_head(config: ModelConfig, folder: Path) -> dict[str, np.ndarray]:
    """The head of a PEFT folder for an encoder, as models/roberta's Head takes it, float32; {} of a decoder's folder.

    Raises InputError where the folder has none, or in part, or one that does not fit the model.
    """
    kind = config.kind.bidirectional
    if kind is None:
        return {}
    tensors, keys = Tensors(folder, config.kind), head_keys(config.kind)
    shapes = tensors.head_shapes()
    labels = next(iter(shapes.get("out_proj.bias", ())), 0)
    expected = head_shapes(kind, config.D, labels)
    problems = [
        f"{key} is {list(shapes[name]) if name in shapes else 'missing'}, expected {list(expected[key])}"
        for name, key in ((name, key.removeprefix(PREFIX)) for name, key in keys.items())
        if shapes.get(name) != expected[key]
    ]
    if problems or not labels:
        said = "; ".join(problems) or "its head has no classes"
        raise InputError(f"{folder / WEIGHTS} does not fit the base model, an encoder with a head: {said}")
    return {name: tensors.read(key).astype(np.float32) for name, key in keys.items()}


def with_head(config: ModelConfig, head: Mapping[str, np.ndarray]) -> ModelConfig:
    """The model with a head of read_head: its tensors then stand in config.outer."""
    kind = config.kind.bidirectional
    if kind is None or not head:
        return config
    with_labels = dataclasses.replace(kind, labels=len(head["out_proj.bias"]))
    return dataclasses.replace(config, kind=dataclasses.replace(config.kind, bidirectional=with_labels))


def settings_with_head(raw: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """config.json of an encoder that has a head, as transformers reads it; of a decoder as it is."""
    kind = config.kind.bidirectional
    if kind is None or not kind.labels:
        return raw
    names = [f"LABEL_{number}" for number in range(kind.labels)]
    if len(raw.get("id2label") or ()) == kind.labels:
        names = list(raw["id2label"].values())
    dropped = ("num_labels", "_num_labels", "problem_type")
    return {key: value for key, value in raw.items() if key not in dropped} | {
        "architectures": [WITH_HEAD],
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
