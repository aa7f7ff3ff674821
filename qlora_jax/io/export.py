"""Writing whole checkpoints as Hugging Face folders, in 16 or 32 bits."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np

from qlora_jax.errors import InputError
from qlora_jax.files import save_tensors, write_json
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.layers import part_of

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def write_checkpoint(out: Path, hf_config: dict, model: Decoder, dtype: str = "bfloat16") -> None:
    """config.json and model.safetensors of an unquantized model; other files of the folder stay.

    Raises InputError for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    config = model.config
    tensors = {key: model.outer(slot) for slot, (key, _) in config.outer.items()}
    for name in config.vectors:
        is_whole = name.endswith((".bias", ".sinks"))
        stacked = part_of(model.blocks, name if is_whole else f"{name}.weight").get_value()
        for index in range(config.depth(name)):
            pieces = config.pieces(index, name)
            tensors |= {key: stacked[index].reshape(-1, *shape)[i] for i, (key, shape) in enumerate(pieces.items())}
    for name in config.linears:
        stacked = part_of(model.blocks, name).weight.get_value()
        tensors |= {
            key: stacked[place].T if config.transposes(name) else stacked[place]
            for key, place in config.slots(name).items()
        }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", hf_config | {"torch_dtype": dtype})
    partial = out / ".model.safetensors.partial"
    save_tensors({key: np.asarray(value, DTYPES[dtype]) for key, value in tensors.items()}, partial)
    os.replace(partial, out / "model.safetensors")
