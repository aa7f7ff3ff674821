"""A checkpoint folder -> a folder quantized to 4 bits, streamed: tensor by tensor from safetensors to safetensors.

Two forms are written: bitsandbytes' (what transformers saves and loads) and our own (qlora_jax.quant.native), which
holds the packed arrays as they are in memory. `load_model` gets from both what it gets by quantizing the source itself,
bit for bit. Embedding, norms and head are copied unchanged.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlora_jax.errors import InputError
from qlora_jax.io.export import DTYPES, write_json
from qlora_jax.io.folder import TensorFiles
from qlora_jax.io.load import QuantSpec, check_tensors, expected_shapes, load_config, read_quantized, stored_quant
from qlora_jax.io.shards import SHARD_BYTES, ShardWriter, copy_companions, new_folder
from qlora_jax.models.config import read_json
from qlora_jax.models.llama import EMBEDDING, LAYER, LINEARS
from qlora_jax.quant import bitsandbytes, native
from qlora_jax.quant.tensor import QuantizedTensor, quantize

FORMS = ("native", "bnb")
QUANTS = ("nf4", "nf4+dq", "fp4", "fp4+dq", "int4", "int4+dq")  # "+dq": double quantization
REPORT = "qlora_jax_quantize.json"


def quant_spec(name: str, block_size: int = 64) -> QuantSpec:
    """Reads "nf4+dq" as QuantSpec("nf4", block_size, True), "none" as 16 bits. Raises InputError for another name."""
    if name not in (*QUANTS, "none"):
        raise InputError(f"quant {name!r}; expected none, {', '.join(QUANTS)}")
    format, _, double = name.partition("+")
    return QuantSpec(format, block_size, bool(double))


def choose_quant(stored: QuantSpec | None, name: str | None, block_size: int | None, where: Path) -> QuantSpec:
    """What to quantize to: what is asked for, nf4 with double quantization in blocks of 64 where nothing is.

    Raises InputError when the source is quantized already and something else is asked for.
    """
    if name is not None and name not in QUANTS:
        raise InputError(f"quant {name!r}; expected one of {', '.join(QUANTS)}")
    if stored is None:
        return quant_spec(name or "nf4+dq", 64 if block_size is None else block_size)
    own_name = stored.format + ("+dq" if stored.double_quant else "")
    wanted = quant_spec(name or own_name, stored.block_size if block_size is None else block_size)
    if wanted != stored:
        raise InputError(
            f"{where} is already quantized ({stored}) and cannot become {wanted} without a second loss: quantize its "
            "original, or leave --quant and --block_size away to change the form on disk only"
        )
    return stored


def linear_keys(layers: int) -> set[str]:
    """Hugging Face keys of the weights that are quantized."""
    return {LAYER.format(index, name) for index in range(layers) for name in LINEARS}


def stored_bytes(files: TensorFiles, keys: set[str]) -> int:
    """Bytes of these tensors in the folder, the parts of quantized ones included."""
    owned = (key for key in files.shapes if (native.part_of(key) or bitsandbytes.part_of(key) or key) in keys)
    return sum(math.prod(files.shapes[key]) * np.dtype(files.dtypes[key]).itemsize for key in owned)


def read_linear(
    files: TensorFiles, key: str, quant: QuantSpec, stored: QuantSpec | None, shape: tuple[int, ...]
) -> QuantizedTensor:
    """The weight `key` [O, I] in 4 bits: as the folder holds it, or quantized from its 16 or 32 bits."""
    if stored is None:
        w = jnp.asarray(files.read(key), files.dtypes[key])
        return quantize(w, quant.format, quant.block_size, quant.double_quant, name=key)
    q = read_quantized(files, key, quant)
    if q.shape != shape:
        raise InputError(f"{files.folder}: {key} is {list(q.shape)} once unpacked, expected {list(shape)}")
    return q


def quantize_folder(
    source: Path,
    out: Path,
    form: str = "native",
    quant: QuantSpec | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Writes `out`: config.json with its quantization_config, the weights, tokenizer files, and the report as JSON.

    Args:
      source: a checkpoint folder; one that is quantized already changes its form only, codes and scales stay the same.
      out: the folder to make; see `new_folder`.
      form: "native" or "bnb".
      quant: of `choose_quant`; None takes its defaults.
      shard_bytes: bytes of a shard at most, unless one weight alone is larger; memory holds one shard and one tensor.
      progress: called with (tensors done, tensors in all).
    Returns:
      the report: bytes before and after, bits a weight of the linear layers (scales included).
    Raises:
      InputError: the source does not fit its config.json or holds NaN or inf, the form cannot hold the format, or `out`
        cannot be written.
    """
    if form not in FORMS:
        raise InputError(f"format {form!r}; expected one of {', '.join(FORMS)}")
    config, stored = load_config(source), stored_quant(source)
    quant = quant or choose_quant(stored, None, None, source)
    if form == "bnb" and quant.format not in bitsandbytes.FORMATS:
        known = " and ".join(bitsandbytes.FORMATS)
        raise InputError(f"bitsandbytes has {known}, not {quant.format}: choose one of them, or --format=native")
    files = TensorFiles(source)
    check_tensors(files, config, quantized=stored is not None)
    shapes, linears = expected_shapes(config), linear_keys(config.L)
    weights = sum(math.prod(shapes[key]) for key in linears)
    linear_before, others = stored_bytes(files, linears), stored_bytes(files, set(shapes) - linears)
    raw = read_json(source / "config.json")
    kept_dtype = raw.get("dtype") or raw.get("torch_dtype")
    if kept_dtype not in DTYPES:
        kept_dtype = files.dtypes[EMBEDDING]
    scales = (1 if quant.double_quant else 4) / quant.block_size
    with new_folder(out, overwrite, [source], needed=others + math.ceil(weights * (0.5 + scales))) as folder:
        writer, linear_after, packed_bytes = ShardWriter(folder, shard_bytes), 0, 0
        for done, (key, shape) in enumerate(shapes.items(), start=1):
            if key in linears:
                q = read_linear(files, key, quant, stored, shape)
                dtype = files.dtypes[key] if stored is None else kept_dtype
                tensors = bitsandbytes.to_bitsandbytes(q, key, dtype) if form == "bnb" else native.to_native(q, key)
                linear_after += sum(value.nbytes for value in tensors.values())
                packed_bytes += q.nbytes
            else:
                tensors = {key: files.read(key)}
            writer.add(tensors)
            progress(done, len(shapes))
        names = writer.finish()
        settings = _bnb_settings(quant, kept_dtype) if form == "bnb" else _native_settings(quant)
        write_json(folder / "config.json", hf_config(raw, kept_dtype) | {"quantization_config": settings})
        report = {
            "source": str(source),
            "source_quant": None if stored is None else str(stored),
            "form": form,
            "format": quant.format,
            "block_size": quant.block_size,
            "double_quant": quant.double_quant,
            "linear_weights": weights,
            "bits_per_weight": round(8 * packed_bytes / weights, 4),
            "linear_bytes_before": linear_before,
            "linear_bytes_after": linear_after,
            "other_bytes": others,
            "bytes_before": linear_before + others,
            "bytes_after": linear_after + others,
            "files": [*names, "config.json", *copy_companions(source, folder)],
        }
        write_json(folder / REPORT, report)
    return report


def hf_config(raw: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A source's config.json for a new folder: dtype said once, no quantization, no pointer to code (never copied)."""
    dropped = ("quantization_config", "auto_map", "dtype", "torch_dtype")
    return {key: value for key, value in raw.items() if key not in dropped} | {"torch_dtype": dtype}


def _native_settings(quant: QuantSpec) -> dict[str, Any]:
    return {
        "quant_method": native.METHOD,
        "format": quant.format,
        "block_size": quant.block_size,
        "double_quant": quant.double_quant,
    }


def _bnb_settings(quant: QuantSpec, dtype: str) -> dict[str, Any]:
    """quantization_config as transformers writes it; the block size stands beside each weight."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quant.format,
        "bnb_4bit_use_double_quant": quant.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
