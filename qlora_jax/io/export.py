"""Writing whole checkpoints as Hugging Face folders, in 16 or 32 bits."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np

from qlora_jax.errors import InputError
from qlora_jax.files import save_tensors, write_json
from qlora_jax.models.llama import EMBEDDING, FINAL_NORM, HEAD, LAYER, LINEARS, NORMS, Llama

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def write_checkpoint(out: Path, hf_config: dict, model: Llama, dtype: str = "bfloat16") -> None:
    """config.json and model.safetensors of an unquantized model; other files of the folder stay.

    Raises InputError for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    tensors = {EMBEDDING: model.embedding.get_value(), FINAL_NORM: model.norm.weight.get_value()}
    if model.head is not None:
        tensors[HEAD] = model.head.get_value()
    for name in LINEARS:
        group, projection = name.split(".")
        stacked = getattr(getattr(model.blocks, group), projection).weight.get_value()
        tensors |= {LAYER.format(index, name): stacked[index] for index in range(model.config.L)}
    for name in NORMS:
        stacked = getattr(model.blocks, name).weight.get_value()
        tensors |= {LAYER.format(index, name): stacked[index] for index in range(model.config.L)}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", hf_config | {"torch_dtype": dtype})
    partial = out / ".model.safetensors.partial"
    save_tensors({key: np.asarray(value, DTYPES[dtype]) for key, value in tensors.items()}, partial)
    os.replace(partial, out / "model.safetensors")
