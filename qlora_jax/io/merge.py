"""Adapter + base -> a whole checkpoint: W_merged = W + scale * B A, in float32, rounded once; streamed.

Where the adapter started as a part of the base (PiSSA, OLoRA) W is what was left of it (qlora_jax.residual).

Which W: a QLoRA adapter was trained beside the dequantized 4-bit weights and has learnt to undo part of their error, so
adding it to them reproduces the model that was trained. Added to the original weights it gives another, often close.
"""

import dataclasses
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.errors import InputError
from qlora_jax.files import write_json
from qlora_jax.finite import first_not_finite
from qlora_jax.io import fused, peft
from qlora_jax.io.adapters.head import read_head, settings_with_head, with_head
from qlora_jax.io.adapters.tensors import PREFIX, head_keys
from qlora_jax.io.export import DTYPES
from qlora_jax.io.folder import has_tokenizer
from qlora_jax.io.load import (
    QuantSpec,
    check_tensors,
    expected_shapes,
    is_packed,
    keys_beside,
    linear_keys,
    load_config,
    open_files,
    quant_of,
    read_packed,
    skipped_linears,
    stored_quant,
    written_key,
)
from qlora_jax.io.peft_config import CONFIG, read_config
from qlora_jax.io.remote import name_of
from qlora_jax.io.shards import SHARD_BYTES, ShardWriter, copy_companions, new_folder
from qlora_jax.io.write import hf_config, read_linear, tensor_bytes
from qlora_jax.models.config import ModelConfig, read_json
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.families.encoders import with_part
from qlora_jax.models.families.module import assembled
from qlora_jax.quant.tensor import QuantizedTensor, dequantize
from qlora_jax.residual import residual
from qlora_jax.settings import config_hash

INTO = ("dequantized", "original")
REPORT = "qlora_jax_export.json"
_CHUNK = 2**24  # values of a weight that are in work at a time
_float32_values = jax.jit(partial(dequantize, dtype=jnp.float32))


class FinishedRun(NamedTuple):
    """What a training workdir says about its result."""

    model: str  # path or hub name of the base
    revision: str
    quant: QuantSpec  # how the base was stored while the adapter was trained
    adapter: Path


def read_run(workdir: Path) -> FinishedRun:
    """Raises InputError when the folder holds no run, or one that is not finished."""
    if not (workdir / "config.json").is_file():
        raise InputError(f"{workdir} holds no run (no config.json); expected a folder that experiments.train wrote")
    config, adapter = read_json(workdir / "config.json"), workdir / "adapter"
    try:
        model, quant = config["model"], config["quant"]
        spec = QuantSpec(quant["format"], quant["block_size"], quant["double_quant"])
        run = FinishedRun(model["path"], model["revision"], spec, adapter)
    except (KeyError, TypeError) as error:
        raise InputError(f"{workdir / 'config.json'} is no config of a training run: {error} is missing") from error
    if (workdir / "summary.json").is_file():
        made_by = read_json(workdir / "summary.json").get("config_hash")
        if made_by not in (None, config_hash(config)):
            raise InputError(
                f"{workdir / 'config.json'} is not the config that the run ended with (summary.json has another "
                "config_hash): put it back, or let experiments.train end the run once more"
            )
    if not adapter.is_dir():
        raise InputError(
            f"{workdir} has no adapter yet, its run is not finished: resume it by experiments.train with the same flags"
        )
    return run


def copy_adapter(adapter: Path, out: Path, overwrite: bool = False) -> list[str]:
    """Copies a PEFT folder's files, seen to be whole and finite, and a tokenizer's beside them; returns their names."""
    read_config(adapter)
    peft.check_weights(adapter)
    weights = adapter / peft.WEIGHTS
    with new_folder(out, overwrite, [adapter], needed=weights.stat().st_size) as folder:
        names = [CONFIG, peft.WEIGHTS, *([peft.PROMPTS] if (adapter / peft.PROMPTS).is_file() else [])]
        for name in names:
            shutil.copyfile(adapter / name, folder / name)
        return [*names, *copy_companions(adapter, folder)]


def merge_folder(
    base: Path,
    adapter: Path,
    out: Path,
    quant: QuantSpec | None = None,
    into: str = "dequantized",
    dtype: str = "bfloat16",
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Writes `out`: a checkpoint as if it had never been quantized or had an adapter, with the base's tokenizer files.

    Embedding and head that the adapter holds whole take the places of the base's, and its tokenizer that of the base's;
    config.json's vocab_size is the number of their rows.

    Args:
      base: checkpoint folder, quantized or not.
      adapter: PEFT folder.
      out: the folder to make; see `new_folder`.
      quant: how the base was stored while the adapter was trained; None is what the folder says.
      into: "dequantized" adds to the values of the 4-bit weights; "original" to the 16- or 32-bit weights.
      dtype: of every tensor written: "bfloat16", "float16" or "float32".
      shard_bytes, progress: see `quantize_folder`.
    Returns:
      the report; `update` and `rounding` are Frobenius norms over all merged layers, relative to that of W: what the
      adapter added, and what rounding to dtype lost.
    Raises:
      InputError: base, adapter or out do not fit, the original is asked of a quantized base, a value overflows dtype.
    """
    for name, value, known in (("merge_into", into, INTO), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise InputError(f"{name} {value!r}; expected one of {', '.join(known)}")
    config, stored = load_config(base), stored_quant(base)
    source = _weights_to_take(base, stored, quant, into)
    files = open_files(base, config)
    check_tensors(files, config, stored, skipped := skipped_linears(base, config))
    skeleton = _skeleton(config)
    lora_config, arrays = peft.read_adapter(skeleton, adapter)
    peft.check_residual(lora_config.residual, source.format != "none", config.kind)
    replaced = {config.embedding_key: "embed_tokens", config.head_key: "lm_head"}
    matrices, head = peft.read_matrices(skeleton, adapter), read_head(config, adapter)
    merged_config = with_head(config, head)
    head = {key.removeprefix(PREFIX): head[name] for name, key in head_keys(config.kind).items()}
    factors = {
        key: (np.asarray(a)[place], np.asarray(b)[place])
        for name, (a, b) in arrays.items()
        for key, place in config.slots(name).items()
    }
    merged_layers = len(factors)
    rows = len(next(iter(matrices.values()))) if matrices else config.V
    shapes, linears = expected_shapes(dataclasses.replace(merged_config, V=rows)), linear_keys(config)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    beside, norms = keys_beside(files, config), np.zeros(3)
    needed = parameters * np.dtype(DTYPES[dtype]).itemsize + sum(tensor_bytes(files, key) for key in beside)
    with new_folder(out, overwrite, [base, adapter], needed=needed) as folder:
        writer, joined = ShardWriter(folder, shard_bytes), fused.Joined(config)
        for done, key in enumerate(shapes, start=1):
            w: Any
            if key in linears and key not in skipped and quant_of(config, linears[key][0], source).format != "none":
                w = read_linear(files, key, linears, source, stored, config)
            elif replaced.get(key) in matrices:
                w = matrices.pop(replaced[key])
            elif key in head:
                w = head.pop(key)
            elif is_packed(files, key):
                w = read_packed(files, key, source, shapes[key])
            else:
                w = files.read(key)
                w = w.T if key in linears and config.transposes(linears[key][0]) else w
            if key in factors:
                how = lora_config.residual, lora_config.rank, lora_config.scale
                kept = residual(w, *how, name=key) if lora_config.residual else w
                merged, parts = _merge(_values(w), _values(kept), *factors.pop(key), lora_config.scale, dtype, key)
                norms += parts
            else:
                merged = _rounded(_values(w), dtype, key)
            if key in linears and config.transposes(linears[key][0]):
                merged = np.ascontiguousarray(merged.T)
            writer.add({written_key(files, config, name): value for name, value in joined.add(key, merged).items()})
            progress(done, len(shapes) + len(beside))
        for done, key in enumerate(beside, start=len(shapes) + 1):
            writer.add({key: files.read(key)})
            progress(done, len(shapes) + len(beside))
        names = writer.finish()
        settings = with_part(hf_config(read_json(base / "config.json"), dtype, config), {"vocab_size": rows})
        write_json(folder / "config.json", settings_with_head(settings, merged_config))
        companions = copy_companions(base, folder)
        if has_tokenizer(adapter):
            companions = sorted({*companions, *copy_companions(adapter, folder)})
        w_norm, update, rounding = (math.sqrt(part) for part in norms)
        report = {
            "base": name_of(base),
            "adapter": str(adapter),
            "merged_into": "original" if source.format == "none" else str(source),
            "dtype": dtype,
            "parameters": parameters,
            "bytes": writer.total_bytes,
            "merged_layers": merged_layers,
            "update": update / w_norm if w_norm else None,
            "rounding": rounding / w_norm if w_norm else None,
            "files": [*names, "config.json", *companions],
        }
        write_json(folder / REPORT, report)
    return report


def _weights_to_take(base: Path, stored: QuantSpec | None, quant: QuantSpec | None, into: str) -> QuantSpec:
    """The form whose values the adapter is added to; "none" is the weights as the folder has them."""
    if into == "original":
        if stored is not None:
            raise InputError(
                f"{base} is quantized ({stored}), the original weights are not in it: name their folder with --model, "
                "or merge into the dequantized weights"
            )
        return QuantSpec("none")
    if stored is not None and quant not in (None, stored):
        raise InputError(f"{base} is quantized ({stored}); the adapter was trained on {quant}: give --model that base")
    return stored or quant or QuantSpec("none")


def _skeleton(config: ModelConfig) -> Decoder:
    """The model's structure with shapes in place of arrays."""
    struct = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    weights: dict[str, Any] = {slot: struct(shape) for slot, (_, shape) in config.outer.items()}
    weights["layers"] = {
        name: struct((config.depth(name), *config.copies(name), *shape)) for name, shape in config.linears.items()
    } | {name: struct((config.depth(name), *shape)) for name, shape in config.vectors.items()}
    return assembled(config, weights, jnp.float32)


def _values(w: Any) -> np.ndarray:
    """[O, I]: the weight as it is, or float32 where it is a QuantizedTensor."""
    return np.asarray(_float32_values(w)) if isinstance(w, QuantizedTensor) else w


def _merge(
    w: np.ndarray, kept: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float, dtype: str, key: str
) -> tuple[np.ndarray, np.ndarray]:
    """W [O, I], what is kept of it beside the adapter [O, I], A [R, I], B [O, R] -> rounded kept + scale * B A.

    And sums of squares: of W, of its update, of the rounding error.
    """
    merged, squares = np.empty(w.shape, DTYPES[dtype]), np.zeros(3)
    rows = max(1, _CHUNK // w.shape[1])
    for start in range(0, w.shape[0], rows):
        part = slice(start, start + rows)
        before = w[part].astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found once rounded
            exact = kept[part].astype(np.float32) + np.float32(scale) * (b[part] @ a)
        merged[part] = rounded = _rounded(exact, dtype, key)
        differences = (before, exact - before, rounded.astype(np.float32) - exact)
        squares += [float(np.vdot(x, x)) for x in differences]
    return merged, squares


def _rounded(value: np.ndarray, dtype: str, key: str) -> np.ndarray:
    """value in dtype. Raises InputError when that is not finite; what was read is, so it is too large."""
    with np.errstate(over="ignore"):
        rounded = value.astype(DTYPES[dtype])
    if first_not_finite(rounded) is not None:
        mend = "use --dtype=bfloat16" if dtype == "float16" else "the adapter adds numbers that no weight can be"
        raise InputError(f"{key} overflows {dtype}: {mend}")
    return rounded
