"""A checkpoint folder -> a model, streamed: tensor by tensor from disk, quantized, written into its layer's place.

Peak memory of the device is the quantized model plus one tensor, of the host a few pieces (io/peaks says both). All
names and shapes are checked against the headers first, so that one error lists everything that does not fit.
"""

import dataclasses
import logging
import re
from collections.abc import Callable, Container, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax import checksums
from qlora_jax.errors import InputError
from qlora_jax.io import fused
from qlora_jax.io.folder import TensorFiles, are_equal, has_weights, signature
from qlora_jax.io.place import anywhere, as_read, kept_dtype, of_weight, stacked, to_device, vectors
from qlora_jax.io.remote import name_of
from qlora_jax.mesh.processes import merged
from qlora_jax.models.config import ModelConfig, parse_config, read_json
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.families.module import assembled
from qlora_jax.models.kind import Kind
from qlora_jax.quant import bitsandbytes, int8, mxfp4, native
from qlora_jax.quant.tensor import QuantizedTensor, check_block_size, check_format, check_kernel, dequantize, quantize

log = logging.getLogger(__name__)
_values = jax.jit(dequantize, static_argnums=1)
_FLOATS = ("float32", "float16", "bfloat16")
_HARMLESS = ("rotary_emb.inv_freq",)  # buffers that old checkpoints carry and that follow from config.json


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How the linear layers are stored. format "none" keeps 16 bits (32 where file and computation are float32).

    int8 has a scale a row: whatever is said, its block_size is 0 and its double_quant False.
    """

    format: str = "nf4"
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self):
        if self.format == int8.FORMAT:
            object.__setattr__(self, "block_size", 0)
            object.__setattr__(self, "double_quant", False)
        elif self.format != "none":
            check_format(self.format)
            check_block_size(self.block_size)

    def __str__(self) -> str:
        if self.format == "none":
            return "16-bit"
        if self.format == int8.FORMAT:
            return "int8, a scale a row"
        return f"{self.format}{' + double quantization' if self.double_quant else ''}, blocks of {self.block_size}"


def stored_quant(folder: Path) -> QuantSpec | None:
    """How a folder's linear layers, but for experts in MXFP4, are quantized on disk; None when they are not.

    Raises InputError for a quantization that cannot be read (GPTQ, AWQ, ...).
    """
    raw = _quantization(folder)
    if raw is None:
        return None
    method = raw.get("quant_method")
    if method == mxfp4.FORMAT:
        return None  # experts alone, which stay what they are (`quant_of`)
    if method == native.METHOD:
        return QuantSpec(*native.read_settings(raw, f"{name_of(folder)}/config.json"))
    if method == "bitsandbytes" and (raw.get("load_in_4bit") or raw.get("load_in_8bit")):
        files = TensorFiles(folder)
        first = next((owner for key in files.shapes if (owner := bitsandbytes.part_of(key))), None)
        if first is None:
            raise InputError(f"{name_of(folder)}: config.json names bitsandbytes, but no tensor is quantized")
        q = _read_bitsandbytes(files, first)
        return QuantSpec(q.format, q.block_size, q.double_quant)
    raise InputError(
        f"{name_of(folder)} is quantized by {method!r}; readable are bitsandbytes folders (4 and 8 bits), our own "
        "(experiments.quantize) and unquantized ones: name the model that it was made from"
    )


def _quantization(folder: Path) -> dict[str, Any] | None:
    """What config.json says of a quantization. Raises InputError where it is no object."""
    raw = read_json(folder / "config.json").get("quantization_config")
    if raw is not None and not isinstance(raw, dict):
        raise InputError(f"{name_of(folder)}/config.json: quantization_config is {raw!r}; expected an object")
    return raw


def skipped_linears(folder: Path, config: ModelConfig) -> frozenset[str]:
    """Keys of the linear layers that a bitsandbytes folder keeps in 16 bits: those that llm_int8_skip_modules names,
    and in a T5 the last of each feed-forward.

    As transformers reads it: the beginning of a module's full name up to a dot, or the end of it.
    """
    raw = _quantization(folder) or {}
    names = raw.get("llm_int8_skip_modules") or [] if raw.get("quant_method") == "bitsandbytes" else []
    where = f"{name_of(folder)}/config.json: llm_int8_skip_modules"
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where} is {names!r}; expected a list of modules' names")
    if config.kind.pair and raw.get("quant_method") == "bitsandbytes":
        names = [*names, "wo"]  # which transformers leaves out by itself
    if expressions := [name for name in names if not re.fullmatch(r"[\w.-]+", name)]:
        raise InputError(f"{where} has {expressions[0]!r}, a regular expression; names of modules are read")
    modules = (key.removesuffix(".weight") for key in linear_keys(config)) if names else ()
    return frozenset(
        f"{module}.weight"
        for module in modules
        if any(f"{module}.".startswith(f"{name.removesuffix('.')}.") or module.endswith(name) for name in names)
    )


def linear_keys(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The weights that are quantized: Hugging Face key -> projection, place in its stack; in the order of files."""
    slots = {key: (name, place) for name in config.linears for key, place in config.slots(name).items()}
    return dict(sorted(slots.items(), key=lambda item: item[1][1][0]))


def open_files(folder: Path, config: ModelConfig) -> TensorFiles:
    """The folder's tensors under the keys of `expected_shapes`, whichever of a family's spellings they have."""
    return TensorFiles(folder, rename=partial(_own_keys, config.kind), split=partial(fused.split, config))


def _own_keys(kind: Kind, keys: Sequence[str]) -> dict[str, str]:
    """Keys of old or other spellings -> those of the family's table."""
    found, head = {}, f"{kind.head}."
    if kind.optional_prefix and not any(key.startswith(kind.optional_prefix) for key in keys):
        found = {key: kind.optional_prefix + key for key in keys if not key.startswith(head)}
    for theirs, ours in kind.renamed:
        found |= {key: ours + key.removeprefix(theirs) for key in keys if key.startswith(theirs)}
    return {key: new for key, new in found.items() if new not in keys}


def keys_beside(files: TensorFiles, config: ModelConfig) -> list[str]:
    """Tensors of the model's other parts: not computed with, but part of every folder that is made of this one."""
    return [key for key in files.shapes if key.startswith(config.kind.beside)]


def written_key(files: TensorFiles, config: ModelConfig, key: str) -> str:
    """What a tensor is called in a folder that is made of this one: where it has other parts too as it is called there,
    so that one spelling goes through, else as the family's table has it."""
    if config.kind.beside and files.names[config.embedding_key] != config.embedding_key:
        for theirs, ours in config.kind.renamed:
            if key.startswith(ours):
                return theirs + key.removeprefix(ours)
    return key


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of an unquantized checkpoint: Hugging Face key -> shape."""
    shapes: dict[str, tuple[int, ...]] = dict(config.outer.values())
    units = {unit: config.stored(name) for name in config.linears for unit in config.units(name)}
    for index in range(config.L):
        shapes |= {config.key(index, unit): shape for unit, shape in units.items() if index < config.depth(unit)}
        for name in config.vectors:
            shapes |= config.pieces(index, name) if index < config.depth(name) else {}
    return shapes


def quant_of(config: ModelConfig, name: str, quant: QuantSpec) -> QuantSpec:
    """How a linear layer is stored where the others are as `quant` says: experts in MXFP4 stay in it."""
    if config.kind.experts and config.kind.experts.stored and config.is_expert(name):
        return QuantSpec(config.kind.experts.stored, mxfp4.BLOCK, True)
    return quant


def expected_stacks(config: ModelConfig, quant: QuantSpec) -> dict[str, tuple[tuple[int, ...], str]]:
    """Every quantized array of a folder in our own form: key -> shape, dtype."""
    found = {}
    for name in config.linears:
        if (q := abstract_weight(config, name, quant)) is not None:
            for part, value in native.parts(q).items():
                shape = (config.depth(name), *config.copies(name), *value.shape)
                found[native.stack_key(name, part)] = (shape, value.dtype.name)
    return found


def abstract_weight(config: ModelConfig, name: str, quant: QuantSpec) -> QuantizedTensor | None:
    """One weight of a linear layer, quantized, with shapes in place of arrays; None where it keeps 16 bits."""
    own, shape = quant_of(config, name, quant), config.linears[name]
    return None if own.format == "none" else native.abstract(shape, own.format, own.block_size, own.double_quant)


def is_native(files: TensorFiles) -> bool:
    return any(native.is_stack(key) for key in files.shapes)


def is_packed(files: TensorFiles, key: str) -> bool:
    """Whether a weight is stored as bitsandbytes' parts."""
    return bitsandbytes.is_packed(key, files.shapes)


def check_tensors(
    files: TensorFiles, config: ModelConfig, stored: QuantSpec | None, skipped: Container[str] = ()
) -> None:
    """One InputError that lists every missing, unexpected, misshapen or unreadable tensor.

    `stored` is how the linear layers are quantized there, but for the `skipped`; what a bitsandbytes weight's parts
    hold is checked when read.
    """
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
    expected = {key: (shape, _FLOATS) for key, shape in expected_shapes(config).items()}
    linears, packed = {key for key in linear_keys(config) if key not in skipped}, set[str]()
    if stored is None:
        for key, shapes in fused.in_mxfp4(config).items():
            del expected[key]
            expected |= {key + end: (shape, ("uint8",)) for end, shape in shapes.items()}
    else:
        if is_native(files):
            expected |= {key: (shape, (dtype,)) for key, (shape, dtype) in expected_stacks(config, stored).items()}
        else:  # bitsandbytes packs head and routers too where a list of modules to skip leaves them out
            others = {config.head_key, *_router_keys(config)}
            packed = linears | {key for key in others if is_packed(files, key)}
            _check_experts_are_packed(files, config, packed)
        expected = {key: value for key, value in expected.items() if key not in linears | packed}
    harmless = (*_HARMLESS, *config.kind.buffers)
    owners = {key: bitsandbytes.part_of(key) for key in files.shapes}
    problems = [f"missing {key}, quantized" for key in sorted(packed - set(owners.values()))]
    for key, (shape, dtypes) in expected.items():
        if key not in files.shapes:
            problems.append(f"missing {key} {list(shape)}")
        elif files.shapes[key] != shape:
            problems.append(f"{key} is {list(files.shapes[key])}, expected {list(shape)}")
        elif files.dtypes[key] not in dtypes:
            wanted = f"{'one of ' * (len(dtypes) > 1)}{', '.join(dtypes)}"
            problems.append(f"{key} is {files.dtypes[key]}, expected {wanted}")
    for key in sorted(files.shapes):
        known = key in expected or key in packed or owners[key] in packed or key.endswith(harmless)
        if key.startswith(config.kind.beside):
            known = files.dtypes[key] in _FLOATS
        if not known and not (config.tied and key == config.head_key):
            problems.append(f"unexpected {key} {list(files.shapes[key])}")
    if problems:
        shown = "; ".join(problems[:40]) + (f"; and {len(problems) - 40} more" if len(problems) > 40 else "")
        what = f"{files.folder} does not hold the model of its config.json ({len(problems)} problems)"
        raise InputError(f"{what}: {shown}")


def _router_keys(config: ModelConfig) -> list[str]:
    experts = config.kind.experts
    return [config.key(index, experts.router) for index in range(config.L)] if experts else []


def _check_experts_are_packed(files: TensorFiles, config: ModelConfig, packed: Container[str]) -> None:
    """Raises InputError for a bitsandbytes folder of transformers 5, where experts are no linear layers."""
    keys = [key for name in filter(config.is_expert, config.linears) for key in config.slots(name) if key in packed]
    if keys and not any(is_packed(files, key) for key in keys):
        raise InputError(
            f"{files.folder} has its experts in 16 bits and the rest in 4, as transformers 5 leaves them: name the "
            "model that it was made from, whose experts are quantized here"
        )


def load_config(folder: Path) -> ModelConfig:
    """What config.json says; but a head of its own in the weights unties a model, as it does in transformers."""
    config = parse_config(read_json(folder / "config.json"), f"{name_of(folder)}/config.json")
    if config.tied and has_weights(folder) and _has_own_head(folder, config, signature(folder)):
        return dataclasses.replace(config, tied=False)
    return config


@cache
def _has_own_head(folder: Path, config: ModelConfig, _: Any) -> bool:
    """Whether there is a head that differs from the embedding. Where there is one at all both are read."""
    files, head, embedding = open_files(folder, config), config.head_key, config.embedding_key
    if head not in files.shapes or embedding not in files.shapes or are_equal(files, head, files, embedding):
        return False
    log.warning(
        "warning: %s: config.json ties the head to the embedding, but %s differs from it: not tied", files.folder, head
    )
    return True


def load_model(
    folder: Path,
    quant: QuantSpec | None = None,
    compute_dtype: Any = jnp.bfloat16,
    remat: str = "block",
    attention: str = "auto",
    kernel: str = "xla",
    progress: Callable[[int, int], None] = lambda done, total: None,
    sequence_chunk: int = 0,
    take_checksum: Callable[[str], None] = lambda checksum: None,
    place: Callable[[str, Any], Any] = anywhere,
    arrange: Callable[[str, Any], Any] = as_read,
) -> Decoder:
    """Reads a checkpoint.

    Args:
      folder: config.json and safetensors; unquantized, bitsandbytes', or written by `experiments.quantize`.
      quant: how linear layers are kept; None keeps what the folder has. Nothing else is ever quantized.
      compute_dtype: of activations. remat, attention, sequence_chunk: see Decoder.
      kernel: of the 4-bit matmul, one of nf4_matmul.BACKENDS; int8 has "xla", which "auto" takes.
      progress: called with (tensors done, tensors in all).
      take_checksum: called with the checksum of all tensors as they stand in the folder, whatever files they are in.
      place: takes the name of an array in the model's tree (see mesh/rules) and what has its shape and dtype, and says
        how devices hold it, as a jax sharding. arrange: takes a linear layer's name and one of its weights, and lays it
        out as devices divide it.
    Raises:
      InputError: the folder does not fit its config.json, is quantized otherwise than asked, or a weight is not finite.
    """
    config = load_config(folder)
    stored = stored_quant(folder)
    quant = quant or stored or QuantSpec("none")
    if stored is not None and stored != quant:
        raise InputError(
            f"{name_of(folder)} is already quantized ({stored}), not {quant}: ask for what it is, or for its original"
        )
    check_kernel(quant.format, kernel)
    threshold = int8.threshold_of(read_json(folder / "config.json"), name_of(folder))
    files, skipped = open_files(folder, config), skipped_linears(folder, config)
    check_tensors(files, config, stored, skipped)
    total, done = len(expected_shapes(config)), 0

    def count(tensors: int = 1) -> None:
        nonlocal done
        done += tensors
        progress(done, total)

    def array(key: str, dtype: Any = None, sharding: Any = None, is_kept: bool = False) -> jax.Array:
        count()
        return to_device(files, key, dtype or kept_dtype(files.dtypes[key], compute_dtype), sharding, is_kept)

    def linear(name: str, as_array: bool, key: str, slot: tuple[int, ...]) -> QuantizedTensor | jax.Array:
        if quant_of(config, name, quant).format == "none" or key in skipped:
            w = array(key, compute_dtype if as_array else None)
            return w.T if config.transposes(name) else w
        count()
        if stored is None:
            return pack(files, config, name, key, quant, f"{files.folder}: {key}")
        q = read_quantized(files, config, name, slot, quant)
        return _values(q, jnp.dtype(compute_dtype)) if as_array else q

    def other(key: str, shape: tuple[int, ...], dtype: Any, name: str = "") -> jax.Array:
        """What is kept in 16 or 32 bits; `name`: in the model's tree, of what is not a layer's."""
        if is_packed(files, key):
            count()
            return _values(read_packed(files, key, quant, shape), jnp.dtype(compute_dtype))
        return array(key, dtype, place(name, jax.ShapeDtypeStruct(shape, jnp.float32)), is_kept=True)

    if mixed := _mixed(config, skipped):
        log.warning(
            "warning: %s: llm_int8_skip_modules keeps %s unquantized in some layers; layers are stacked, so here these "
            "are unquantized in all of them, with the values that they have there", files.folder, ", ".join(mixed),
        )  # fmt: skip
    weights: dict[str, Any] = {
        slot: other(key, shape, jnp.float32 if config.is_float32(slot) else None, slot)
        for slot, (key, shape) in config.outer.items()
    }
    weights["layers"] = {}
    for name in config.linears:
        slots, room = config.slots(name), (config.depth(name), *config.copies(name))
        if stored is not None and is_native(files) and arrange is as_read:
            stack: Any = _read_stack(files, config, name, quant, place)
            count(len(slots))
        else:
            first, as_array = next(iter(slots)), name in mixed
            dtype = compute_dtype if as_array else kept_dtype(files.dtypes.get(first, "float32"), compute_dtype)
            like: Any = None if as_array or first in skipped else abstract_weight(config, name, quant)
            like = jax.eval_shape(partial(arrange, name), like or jax.ShapeDtypeStruct(config.linears[name], dtype))
            made = lambda key, slot: arrange(name, linear(name, as_array, key, slot))  # noqa: B023, E731
            stack = stacked(made, slots, room, like, of_weight(place, name), in_turns=not is_native(files))
        if isinstance(stack, QuantizedTensor):
            stack = dataclasses.replace(stack, backend=kernel, threshold=threshold)
        weights["layers"][name] = stack
    for name, shape in config.vectors.items():
        dtype = None if name in config.sixteen_bit else jnp.float32
        pieces = [piece for index in range(config.depth(name)) for piece in config.pieces(index, name).items()]
        if len(pieces[0][1]) == 1:
            like = jax.ShapeDtypeStruct((len(pieces), *pieces[0][1]), jnp.float32)
            rows = vectors(files, [key for key, _ in pieces], dtype, compute_dtype, place("", like))
            count(len(pieces))
        else:
            rows = jnp.stack([other(key, piece, dtype) for key, piece in pieces])
        weights["layers"][name] = rows.reshape(config.depth(name), *shape)
    progress(total, total)
    take_checksum(checksums.of(*(f"{key} {checksum}" for key, checksum in sorted(merged(files.checksums).items()))))
    return assembled(config, weights, compute_dtype, remat, attention, sequence_chunk)


def _mixed(config: ModelConfig, skipped: Container[str]) -> list[str]:
    """Linear layers that are skipped in some of the layers and not in others."""
    slots = {name: config.slots(name) for name in config.linears}
    counts = {name: sum(key in skipped for key in keys) for name, keys in slots.items()}
    return [name for name, count in counts.items() if 0 < count < len(slots[name])]


def _read_stack(
    files: TensorFiles, config: ModelConfig, name: str, quant: QuantSpec, place: Callable[[str, Any], Any]
) -> QuantizedTensor:
    """A projection of all layers from a folder in our own form: nothing is computed, what is read is what is kept."""
    assert (q := abstract_weight(config, name, quant)) is not None
    keys = {part: native.stack_key(name, part) for part in native.parts(q)}
    stacks = {part: jax.ShapeDtypeStruct(files.shapes[key], jnp.dtype(files.dtypes[key])) for part, key in keys.items()}
    at = {part: of_weight(place, name)(f".{part}", stack) for part, stack in stacks.items()}
    return native.filled(q, {part: to_device(files, key, None, at[part], is_kept=True) for part, key in keys.items()})


def pack(files: TensorFiles, config: ModelConfig, name: str, key: str, quant: QuantSpec, where: str) -> QuantizedTensor:
    """A weight [O, I] of an unquantized folder, quantized; `where`: what errors call it."""
    own = quant_of(config, name, quant)
    if own.format == mxfp4.FORMAT:
        return mxfp4.read(files.read(key + fused.BLOCKS), files.read(key + fused.SCALES), where)
    w = to_device(files, key)
    return quantize(w.T if config.transposes(name) else w, own.format, own.block_size, own.double_quant, name=where)


def read_quantized(
    files: TensorFiles, config: ModelConfig, name: str, place: tuple[int, ...], quant: QuantSpec
) -> QuantizedTensor:
    """One weight [O, I] of a projection from a quantized folder, either form; `place`: (layer,) or (layer, expert).

    Raises InputError when it is stored otherwise than `quant` says, or has another shape.
    """
    if is_native(files):
        assert (q := abstract_weight(config, name, quant)) is not None
        arrays = {part: jax.device_put(files.read(native.stack_key(name, part), place)) for part in native.parts(q)}
        return native.filled(q, arrays)
    key = config.key(place[0], config.units(name)[place[-1] if len(place) > 1 else 0])
    return read_packed(files, key, quant, config.linears[name])


def read_packed(files: TensorFiles, key: str, quant: QuantSpec, shape: tuple[int, ...]) -> QuantizedTensor:
    """As read_quantized, of a weight in bitsandbytes' form."""
    q = _read_bitsandbytes(files, key)
    found = QuantSpec(q.format, q.block_size, q.double_quant)
    if found != quant:
        raise InputError(
            f"{files.folder}: {key} is stored as {found}, other layers as {quant}; mixed folders are not supported"
        )
    if q.shape != shape:
        raise InputError(f"{files.folder}: {key} is {list(q.shape)} once unpacked, expected {list(shape)}")
    return q


def _read_bitsandbytes(files: TensorFiles, key: str) -> QuantizedTensor:
    parts = {part: files.read(part) for part in bitsandbytes.keys_of(key) if part in files.shapes}
    try:
        return bitsandbytes.from_bitsandbytes(parts, key)
    except InputError as error:
        raise InputError(f"{files.folder}: {error}") from error
