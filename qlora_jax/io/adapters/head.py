"""The head over classes in a PEFT folder for an encoder (task_type SEQ_CLS, "classifier" in modules_to_save)."""

from pathlib import Path

import numpy as np

from qlora_jax.errors import InputError
from qlora_jax.io.adapters.tensors import PREFIX, WEIGHTS, Tensors, head_keys
from qlora_jax.models.config import ModelConfig
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
