"""A checkpoint folder -> a model, streamed: tensor by tensor from disk, quantized, written into its layer's place.

Peak memory is the quantized model plus one tensor. All names and shapes are checked against the headers first, so that
one error lists everything that does not fit.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.errors import InputError
from qlora_jax.io.folder import TensorFiles
from qlora_jax.models import llama
from qlora_jax.models.config import ModelConfig, parse_config, read_json
from qlora_jax.models.llama import EMBEDDING, FINAL_NORM, HEAD, LAYER, LINEARS, NORMS, Llama
from qlora_jax.quant import bitsandbytes, native
from qlora_jax.quant.codebooks import codebook
from qlora_jax.quant.tensor import QuantizedTensor, check_block_size, quantize

_FLOATS = ("float32", "float16", "bfloat16")
_HARMLESS = ("rotary_emb.inv_freq",)  # buffers that old checkpoints carry and that follow from config.json


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How the linear layers are stored. format "none" keeps 16 bits (32 where file and computation are float32)."""

    format: str = "nf4"
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self):
        if self.format != "none":
            codebook(self.format)
            check_block_size(self.block_size)

    def __str__(self) -> str:
        if self.format == "none":
            return "16-bit"
        return f"{self.format}{' + double quantization' if self.double_quant else ''}, blocks of {self.block_size}"


def stored_quant(folder: Path) -> QuantSpec | None:
    """How a folder's linear layers are quantized on disk; None when they are not.

    Raises InputError for a quantization that cannot be read (GPTQ, AWQ, 8 bits, ...).
    """
    raw = read_json(folder / "config.json").get("quantization_config")
    if raw is None:
        return None
    method = raw.get("quant_method")
    if method == native.METHOD:
        lacking = [key for key in ("format", "block_size", "double_quant") if key not in raw]
        if lacking:
            raise InputError(f"{folder / 'config.json'}: quantization_config lacks {', '.join(lacking)}")
        return QuantSpec(raw["format"], raw["block_size"], raw["double_quant"])
    if method == "bitsandbytes" and raw.get("load_in_4bit"):
        files = TensorFiles(folder)
        first = LAYER.format(0, next(iter(LINEARS)))
        parts = {key: files.read(key) for key in files.shapes if key == first or bitsandbytes.part_of(key) == first}
        q = bitsandbytes.from_bitsandbytes(parts, first)
        return QuantSpec(q.format, q.block_size, q.double_quant)
    raise InputError(
        f"{folder} is quantized by {method!r}; readable are bitsandbytes 4-bit folders, our own (experiments.quantize) "
        "and unquantized ones"
    )


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of an unquantized checkpoint: Hugging Face key -> shape."""
    V, D = config.V, config.D
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (V, D), FINAL_NORM: (D,)}
    if not config.tied:
        shapes[HEAD] = (V, D)
    for index in range(config.L):
        for name, letters in (LINEARS | NORMS).items():
            shapes[LAYER.format(index, name)] = llama.sizes(config, letters)
    return shapes


def check_tensors(files: TensorFiles, config: ModelConfig, quantized: bool) -> None:
    """One InputError that lists every missing, unexpected, misshapen or unreadable tensor."""
    expected = expected_shapes(config)
    linears = {LAYER.format(index, name) for index in range(config.L) for name in LINEARS}
    problems = []
    owners = {key: _owner(key) for key in files.shapes}
    for key, shape in expected.items():
        if quantized and key in linears:
            if key not in owners.values():
                problems.append(f"missing {key}, quantized")
        elif key not in files.shapes:
            problems.append(f"missing {key} {list(shape)}")
        elif files.shapes[key] != shape:
            problems.append(f"{key} is {list(files.shapes[key])}, expected {list(shape)}")
        elif files.dtypes[key] not in _FLOATS:
            problems.append(f"{key} is {files.dtypes[key]}, expected one of {', '.join(_FLOATS)}")
    for key in sorted(files.shapes):
        known = key in expected or (quantized and owners[key] in linears) or key.endswith(_HARMLESS)
        if not known and not (config.tied and key == HEAD):
            problems.append(f"unexpected {key} {list(files.shapes[key])}")
    if problems:
        shown = "; ".join(problems[:40]) + (f"; and {len(problems) - 40} more" if len(problems) > 40 else "")
        raise InputError(
            f"{files.folder} does not hold the model of its config.json ({len(problems)} problems): {shown}"
        )


def _owner(key: str) -> str | None:
    return bitsandbytes.part_of(key) or native.part_of(key)


def load_config(folder: Path) -> ModelConfig:
    return parse_config(read_json(folder / "config.json"), str(folder / "config.json"))


def load_model(
    folder: Path,
    quant: QuantSpec | None = None,
    compute_dtype: Any = jnp.bfloat16,
    remat: str = "block",
    attention: str = "auto",
    kernel: str = "xla",
    progress: Callable[[int, int], None] = lambda done, total: None,
    compute: str = "full",
    fuse_lora: bool = False,
    sequence_chunk: int = 0,
) -> Llama:
    """Reads a checkpoint.

    Args:
      folder: config.json and safetensors; unquantized, bnb-4bit, or written by `experiments.quantize`.
      quant: how linear layers are kept; None keeps what the folder has. Embedding, norms and head are never quantized.
      compute_dtype: of activations.
      remat, attention, sequence_chunk: see Llama.
      kernel: of the 4-bit matmul, one of nf4_matmul.BACKENDS.
      progress: called with (tensors done, tensors in all).
      compute: of the 4-bit matmul's forward, one of nf4_matmul.COMPUTE.
      fuse_lora: add an adapter inside the 4-bit kernel; kernel "triton" alone.
    Raises:
      InputError: the folder does not fit its config.json, is quantized otherwise than asked, or a weight is not finite.
    """
    config = load_config(folder)
    stored = stored_quant(folder)
    quant = quant or stored or QuantSpec("none")
    if stored is not None and stored != quant:
        raise InputError(
            f"{folder} is already quantized ({stored}), not {quant}: ask for what it is, or for its original"
        )
    files = TensorFiles(folder)
    check_tensors(files, config, quantized=stored is not None)
    total, done = len(expected_shapes(config)), 0

    def array(key: str, dtype: Any = None) -> jax.Array:
        nonlocal done
        done += 1
        progress(done, total)
        return jnp.asarray(files.read(key), dtype or _kept_dtype(files.dtypes[key], compute_dtype))

    def linear(key: str) -> QuantizedTensor | jax.Array:
        if quant.format == "none":
            return array(key)
        if stored is None:
            return quantize(array(key, files.dtypes[key]), quant.format, quant.block_size, quant.double_quant, name=key)
        return read_quantized(files, key, quant)

    weights: dict[str, Any] = {"embedding": array(EMBEDDING), "norm": array(FINAL_NORM, jnp.float32), "layers": {}}
    if not config.tied:
        weights["head"] = array(HEAD)
    for name in LINEARS:
        shape = llama.sizes(config, LINEARS[name])
        stack = None
        for index in range(config.L):
            key = LAYER.format(index, name)
            leaf = linear(key)
            if isinstance(leaf, QuantizedTensor):
                leaf = dataclasses.replace(leaf, backend=kernel, compute=compute, fuse_lora=fuse_lora)
            if stored is not None and leaf.shape != shape:
                raise InputError(f"{files.folder}: {key} is {list(leaf.shape)} once unpacked, expected {list(shape)}")
            stack = _put(stack, leaf, index, config.L)
        weights["layers"][name] = stack
    for name in NORMS:
        norms = [array(LAYER.format(index, name), jnp.float32) for index in range(config.L)]
        weights["layers"][name] = jnp.stack(norms)
    progress(total, total)
    return Llama(config, weights, compute_dtype, remat, attention, sequence_chunk)


def _kept_dtype(stored: str, compute_dtype: Any) -> Any:
    """16-bit values stay what they are; 32-bit ones are kept only for a float32 computation."""
    return jnp.dtype(stored) if stored != "float32" else jnp.dtype(compute_dtype)


def read_quantized(files: TensorFiles, key: str, quant: QuantSpec) -> QuantizedTensor:
    parts = {part: files.read(part) for part in (key, *_parts(files, key)) if part in files.shapes}
    q = native.from_native(parts, key) if f"{key}.codes" in parts else bitsandbytes.from_bitsandbytes(parts, key)
    found = QuantSpec(q.format, q.block_size, q.double_quant)
    if found != quant:
        raise InputError(
            f"{files.folder}: {key} is stored as {found}, other layers as {quant}; mixed folders are not supported"
        )
    return q


def _parts(files: TensorFiles, key: str) -> list[str]:
    return [part for part in files.shapes if part.startswith(key + ".")]


def _put(stack: Any, leaf: Any, index: int, layers: int) -> Any:
    """Writes one layer into its place; the stack is allocated once and updated in place (donated)."""
    if stack is None:
        stack = jax.tree.map(lambda x: jnp.zeros((layers, *x.shape), x.dtype), leaf)
    return _write(stack, leaf, jnp.int32(index))


@partial(jax.jit, donate_argnums=0)
def _write(stack: Any, leaf: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x, index, 0), stack, leaf)
