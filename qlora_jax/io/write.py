"""A checkpoint folder -> a folder quantized to 4 or 8 bits, streamed: tensor by tensor from safetensors to safetensors.

Two forms are written: bitsandbytes' (what transformers saves and loads) and our own (qlora_jax.quant.native), which
holds the packed arrays as the device does, all layers together. `load_model` gets from both what it gets by quantizing
the source itself, bit for bit. Embedding, norms and head are copied unchanged.
"""

import math
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qlora_jax.errors import InputError
from qlora_jax.files import write_json
from qlora_jax.io.export import DTYPES
from qlora_jax.io.folder import TensorFiles
from qlora_jax.io.header import numpy_dtype
from qlora_jax.io.load import (
    QuantSpec,
    check_tensors,
    expected_shapes,
    expected_stacks,
    is_packed,
    keys_beside,
    linear_keys,
    load_config,
    open_files,
    pack,
    read_quantized,
    skipped_linears,
    stored_quant,
    written_key,
)
from qlora_jax.io.remote import name_of
from qlora_jax.io.shards import SHARD_BYTES, ShardWriter, StackWriter, copy_companions, new_folder
from qlora_jax.models.config import ModelConfig, read_json
from qlora_jax.models.families.encoders import ENCODER, with_part
from qlora_jax.quant import bitsandbytes, int8, native
from qlora_jax.quant.tensor import QuantizedTensor

FORMS = ("native", "bnb")
# "+dq": double quantization
QUANTS = ("nf4", "nf4+dq", "fp4", "fp4+dq", "int4", "int4+dq", "fp4-e3m0", "fp4-e3m0+dq", "int8")
REPORT = "qlora_jax_quantize.json"
Linears = Mapping[str, tuple[str, tuple[int, ...]]]  # of linear_keys


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
    refuse_blocks(name if stored is None else stored.format, block_size)
    if stored is None:
        return quant_spec(name or "nf4+dq", 64 if block_size is None else block_size)
    own_name = stored.format + ("+dq" if stored.double_quant else "")
    wanted = quant_spec(name or own_name, stored.block_size if block_size is None else block_size)
    if wanted != stored:
        raise InputError(
            f"{name_of(where)} is already quantized ({stored}) and cannot become {wanted} without a second loss: "
            "quantize its original, or leave --quant and --block_size away to change the form on disk only"
        )
    return stored


def refuse_blocks(name: str | None, block_size: int | None) -> None:
    """Raises InputError for a block size that would have no effect."""
    if name == int8.FORMAT and block_size is not None:
        raise InputError(f"--block_size={block_size}, but int8 has no blocks, it has a scale a row: leave it out")


def linear_bytes(files: TensorFiles, linears: Container[str]) -> int:
    """Bytes of the linear layers in the folder, the parts of quantized ones included."""
    owned = (key for key in files.shapes if native.is_stack(key) or (bitsandbytes.part_of(key) or key) in linears)
    return sum(tensor_bytes(files, key) for key in owned)


def tensor_bytes(files: TensorFiles, key: str) -> int:
    return math.prod(files.shapes[key]) * numpy_dtype(files.dtypes[key]).itemsize


def read_linear(
    files: TensorFiles, key: str, linears: Linears, quant: QuantSpec, stored: QuantSpec | None, config: ModelConfig
) -> QuantizedTensor:
    """One weight [O, I] of `linear_keys`, quantized: as the folder holds it, or quantized from its 16 or 32 bits."""
    name, place = linears[key]
    if stored is not None:
        return read_quantized(files, config, name, place, quant)
    return pack(files, config, name, key, quant, key)


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
      shard_bytes: bytes of a shard at most, unless what stays together is larger: a weight, in our form a projection of
        all layers. Memory holds one tensor, for "bnb" also one shard.
      progress: called with (tensors done, tensors in all).
    Returns:
      the report: bytes before and after, bits a weight of the linear layers (scales included).
    Raises:
      InputError: the source does not fit its config.json, holds NaN or inf or is quantized in part; the form cannot
        hold the format; or `out` cannot be written.
    """
    if form not in FORMS:
        raise InputError(f"format {form!r}; expected one of {', '.join(FORMS)}")
    config, stored = load_config(source), stored_quant(source)
    quant = quant or choose_quant(stored, None, None, source)
    if form == "bnb" and quant.format not in bitsandbytes.FORMATS:
        known = ", ".join(bitsandbytes.FORMATS)
        raise InputError(f"bitsandbytes has {known}, not {quant.format}: choose one of them, or --format=native")
    if form == "bnb" and config.kind.pair:
        raise InputError(
            f"{name_of(source)} is a T5, of which transformers keeps wo in 16 bits or more when it reads bitsandbytes' "
            "form: use --format=native"
        )
    if form == "bnb" and config.sparse:
        raise InputError(
            f"{name_of(source)} is a mixture of experts, and in transformers 5 bitsandbytes keeps experts in 16 bits: "
            "nothing would read quantized ones from its form; use --format=native"
        )
    if form == "bnb" and config.kind.bidirectional:
        raise InputError(
            f"{name_of(source)} is an encoder, whose heads transformers would look for in a folder of bitsandbytes' "
            "form: use --format=native"
        )
    files = open_files(source, config)
    if stored is not None and (skipped_linears(source, config) or is_packed(files, config.head_key)):
        raise InputError(
            f"{name_of(source)} is quantized with llm_int8_skip_modules, so that other layers are quantized than those "
            "that are written here: use it as it is, or quantize the model that it was made from"
        )
    check_tensors(files, config, stored)
    shapes, linears = expected_shapes(config), linear_keys(config)
    weights = sum(math.prod(shapes[key]) for key in linears)
    linear_before = linear_bytes(files, linears)
    others = sum(tensor_bytes(files, key) for key in [*shapes, *keys_beside(files, config)] if key not in linears)
    raw = read_json(source / "config.json")
    kept_dtype = raw.get("dtype") or raw.get("torch_dtype")
    if kept_dtype not in DTYPES:
        kept_dtype = files.dtypes[config.embedding_key]
    stacks = expected_stacks(config, quant)
    packed = sum(math.prod(shape) * numpy_dtype(dtype).itemsize for shape, dtype in stacks.values())
    with new_folder(out, overwrite, [source], needed=others + packed) as folder:
        write = _write_bnb if form == "bnb" else _write_native
        job = _Job(files, config, quant, stored, kept_dtype, shard_bytes, progress)
        names, linear_after = write(job, folder)
        if form == "bnb":
            settings = _bnb_settings(quant, kept_dtype, config)
        else:
            settings = native.settings(quant.format, quant.block_size, quant.double_quant)
        if quant.format == int8.FORMAT:
            settings["llm_int8_threshold"] = int8.threshold_of(raw, name_of(source))
        if form == "native" and config.kind.experts and config.kind.experts.stored:
            settings["experts"] = config.kind.experts.stored
        write_json(folder / "config.json", hf_config(raw, kept_dtype, config) | {"quantization_config": settings})
        report = {
            "source": name_of(source),
            "source_quant": None if stored is None else str(stored),
            "form": form,
            "format": quant.format,
            "block_size": quant.block_size,
            "double_quant": quant.double_quant,
            "linear_weights": weights,
            "bits_per_weight": round(8 * packed / weights, 4),
            "linear_bytes_before": linear_before,
            "linear_bytes_after": linear_after,
            "other_bytes": others,
            "bytes_before": linear_before + others,
            "bytes_after": linear_after + others,
            "files": [*names, "config.json", *copy_companions(source, folder)],
        }
        write_json(folder / REPORT, report)
    return report


class _Job(NamedTuple):
    files: TensorFiles
    config: ModelConfig
    quant: QuantSpec
    stored: QuantSpec | None
    dtype: str  # that bitsandbytes will dequantize a weight to which is quantized already
    shard_bytes: int
    progress: Callable[[int, int], None]


def _write_bnb(job: _Job, folder: Path) -> tuple[list[str], int]:
    """Returns the names of the files and the bytes of the linear layers in them."""
    files, config, linears = job.files, job.config, linear_keys(job.config)
    keys = [*expected_shapes(config), *keys_beside(files, config)]
    writer, linear_after = ShardWriter(folder, job.shard_bytes), 0
    for done, key in enumerate(keys, start=1):
        written = written_key(files, config, key)
        if key in linears:
            q = read_linear(files, key, linears, job.quant, job.stored, config)
            tensors = bitsandbytes.to_bitsandbytes(q, written, files.dtypes[key] if job.stored is None else job.dtype)
            linear_after += sum(value.nbytes for value in tensors.values())
        else:
            tensors = {written: files.read(key)}
        writer.add(tensors)
        job.progress(done, len(keys))
    return writer.finish(), linear_after


def _write_native(job: _Job, folder: Path) -> tuple[list[str], int]:
    """The same in our own form: what is copied first, then a projection of all layers after the other."""
    files, config = job.files, job.config
    shapes, linears, beside = expected_shapes(config), linear_keys(config), keys_beside(files, config)
    copied = [*(key for key in shapes if key not in linears), *beside]
    written = {key: written_key(files, config, key) for key in copied}
    total = len(shapes) + len(beside)
    stacks = {key: (dtype, shape) for key, (shape, dtype) in expected_stacks(job.config, job.quant).items()}
    groups = [{written[key]: (files.dtypes[key], files.shapes[key])} for key in copied]
    begins = [native.stack_key(name, "") for name in job.config.linears]
    groups += [{key: stacks[key] for key in stacks if key.startswith(begin)} for begin in begins]
    done, linear_after = 0, 0

    def count() -> None:
        nonlocal done
        done += 1
        job.progress(done, total)

    with StackWriter(folder, groups, job.shard_bytes) as writer:
        for key in copied:
            first = 0
            for _, piece in files.pieces(key):
                writer.write(written[key], first, piece)
                first += piece.size
                del piece
            count()
        for name in job.config.linears:
            for index, key in enumerate(job.config.slots(name)):
                parts = native.parts(read_linear(files, key, linears, job.quant, job.stored, job.config))
                for part, value in parts.items():
                    writer.write(native.stack_key(name, part), index * value.size, np.asarray(value))
                    linear_after += value.nbytes
                count()
        return writer.finish(), linear_after


def hf_config(raw: dict[str, Any], dtype: str, config: ModelConfig) -> dict[str, Any]:
    """A source's config.json for a new folder: dtype said once, no quantization, tied only where the model is, and no
    pointer to code (never copied) or to other files of weights."""
    dropped = ("quantization_config", "auto_map", "dtype", "torch_dtype", "transformers_weights")
    kept = {key: value for key, value in raw.items() if key not in dropped} | {"torch_dtype": dtype}
    if config.kind.pair and raw.get("scale_decoder_outputs", True):
        kept |= {"scale_decoder_outputs": config.kind.logit_scale != 1}  # transformers takes it from the ties else
    return with_part(kept, {} if config.tied else {"tie_word_embeddings": False})


def _bnb_settings(quant: QuantSpec, dtype: str, config: ModelConfig) -> dict[str, Any]:
    """quantization_config as transformers writes it; the block size stands beside each weight.

    Where it is told what to leave in 16 bits, it takes the head for 4 bits unless that is told too.
    """
    parts = [*ENCODER, *(f"model.{name}" for name in ENCODER)]
    in_8_bits = quant.format == int8.FORMAT
    return {
        "_load_in_4bit": not in_8_bits,
        "_load_in_8bit": in_8_bits,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4" if in_8_bits else quant.format,
        "bnb_4bit_use_double_quant": quant.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": [*parts, config.kind.head] if config.kind.beside else None,
        "llm_int8_threshold": int8.THRESHOLD,
        "load_in_4bit": not in_8_bits,
        "load_in_8bit": in_8_bits,
        "quant_method": "bitsandbytes",
    }
