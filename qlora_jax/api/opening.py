"""A model, its tokenizer and its adapter, from the folders that a user names."""

from pathlib import Path

import jax

from qlora_jax.errors import InputError
from qlora_jax.io.folder import has_tokenizer
from qlora_jax.io.load import QuantSpec, load_config, stored_quant
from qlora_jax.io.peft import matrix_shapes
from qlora_jax.io.peft_config import read_config
from qlora_jax.io.write import QUANTS as QUANTIZED
from qlora_jax.io.write import quant_spec, refuse_blocks
from qlora_jax.models.decoder import Decoder
from qlora_jax.residual import check_base
from qlora_jax.text.tokenizer import Tokenizer

QUANTS = ("none", *QUANTIZED)


def quant_name(spec: QuantSpec) -> str:
    """One of QUANTS."""
    return spec.format + ("+dq" if spec.double_quant and spec.format != "none" else "")


def choose_quant(folder: Path, name: str | None, block_size: int | None, otherwise: str = "none") -> QuantSpec:
    """How the linear layers of a checkpoint folder are to be kept.

    Args:
      name: one of QUANTS; None keeps what the folder has, or `otherwise` where it is not quantized.
      block_size: values that share a scale; None is the folder's own, or 64.
    Raises:
      InputError: an unknown name, or one that the folder's own form is not; a block size for int8.
    """
    stored = stored_quant(folder)
    if name is None:
        name = otherwise if stored is None else quant_name(stored)
    refuse_blocks(name, block_size)
    default = 64 if stored is None else stored.block_size
    return quant_spec(name, default if block_size is None else block_size)


def default_dtype() -> str:
    """Of activations: what this machine is fast at."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def find_tokenizer(folder: Path, adapter: Path | None) -> Tokenizer:
    """The adapter's tokenizer where it has one, as one with added tokens has; else the checkpoint's."""
    if adapter is not None and has_tokenizer(adapter):
        return Tokenizer.from_folder(adapter, folder)
    return Tokenizer.from_folder(folder)


def vocabulary(folder: Path, adapter: Path | None) -> int:
    """Rows of the embedding, with those that the adapter adds."""
    config = load_config(folder)
    shapes = matrix_shapes(adapter, config.kind) if adapter is not None else {}
    return next((shape[0] for shape in shapes.values()), config.V)


def check_adapter(adapter: Path | None, spec: QuantSpec) -> str:
    """What the adapter takes out of its base ("" for nothing), found before minutes of loading.

    Raises InputError where that cannot be done with this base, or the folder is no adapter.
    """
    if adapter is None:
        return ""
    residual = read_config(adapter).residual
    check_base(residual, spec.format != "none")
    return residual


def eos_ids(model: Decoder, tokenizer: Tokenizer) -> list[int]:
    """The ids that end an answer, by tokenizer and model."""
    return sorted({*tokenizer.eos_ids, *model.config.eos_ids})


def refuse_block_size(folder: Path, block_size: int | None) -> None:
    """Raises InputError for a block size where nothing says that the model is to be quantized."""
    if block_size is not None and stored_quant(folder) is None:
        raise InputError(
            f"--block_size={block_size} without --quant, and {folder} is not quantized; say --quant=nf4 or another"
        )
