"""Between QuantizedTensor and the keys of a bnb-4bit safetensors file (transformers' form).

For a weight P: `P` uint8 [ceil(O * I / 2), 1] (first of two values in the high nibble), `P.absmax` (uint8 with double
quantization, else float32), `P.quant_map` float32 [16], with double quantization `P.nested_absmax` and
`P.nested_quant_map` float32 [256], and `P.quant_state.bitsandbytes__nf4` (or `__fp4`): uint8 bytes of JSON {quant_type,
blocksize, dtype, shape, nested_blocksize, nested_dtype, nested_offset}. int8.py has the keys of 8 bits.
"""

import json
from collections.abc import Container, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.nf4_matmul import NESTED_BLOCK
from qlora_jax.errors import InputError
from qlora_jax.files import loads
from qlora_jax.finite import check_finite
from qlora_jax.quant import int8
from qlora_jax.quant.codebooks import absmax_map, codebook
from qlora_jax.quant.tensor import QuantizedTensor, check_block_size, in_8_bits

FORMATS = ("nf4", "fp4", int8.FORMAT)
_FOUR_BITS = ("nf4", "fp4")
_STATE = "quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(_STATE + name for name in _FOUR_BITS))


def part_of(key: str) -> str | None:
    """The weight whose quantization a file's key belongs to ("a.weight.absmax" -> "a.weight"); None for other keys."""
    for part in _PARTS:
        if key.endswith("." + part):
            return key[: -len(part) - 1]
    for part in int8.PARTS:
        if f".{key}".endswith(f".{part}"):
            return key.removesuffix(part) + "weight"
    return None


def keys_of(key: str) -> list[str]:
    """The keys that a weight's quantization may have in a file."""
    return [key, *(f"{key}.{part}" for part in _PARTS), *(int8.beside(key, part) for part in int8.PARTS)]


def is_packed(key: str, keys: Container[str]) -> bool:
    """Whether a weight of a file with these keys is quantized."""
    return f"{key}.absmax" in keys or int8.beside(key, "SCB") in keys


def to_bitsandbytes(q: QuantizedTensor, name: str = "weight", dtype: str = "bfloat16") -> dict[str, np.ndarray]:
    """The tensors of q under a bitsandbytes file's keys; dtype is the one that it will dequantize 4 bits to.

    Raises InputError for int4 and fp4-e3m0, which bitsandbytes' kernels do not have.
    """
    if q.in_8_bits:
        return int8.to_file(q.codes, q.absmax, name)
    if q.format not in FORMATS:
        raise InputError(f"{name} is {q.format}; bitsandbytes' files hold {', '.join(FORMATS)}: use the native format")
    n = q.shape[0] * q.shape[1]
    state = {"quant_type": q.format, "blocksize": q.block_size, "dtype": dtype, "shape": list(q.shape)}
    tensors = {
        name: _interleave(np.asarray(q.codes), n)[:, None],
        f"{name}.absmax": np.asarray(q.absmax),
        f"{name}.quant_map": np.asarray(codebook(q.format).values, np.float32),
    }
    if q.double_quant:
        tensors[f"{name}.nested_absmax"] = np.asarray(q.nested_absmax)
        tensors[f"{name}.nested_quant_map"] = np.asarray(absmax_map(), np.float32)
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(np.asarray(q.offset)),
        }
    tensors[f"{name}.{_STATE}{q.format}"] = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
    return tensors


def from_bitsandbytes(tensors: Mapping[str, np.ndarray], name: str = "weight") -> QuantizedTensor:
    """Reads back what bitsandbytes or `to_bitsandbytes` wrote; the stored offset is kept, nothing is quantized again.

    Raises InputError when a part is missing or misshapen, when a scale is not finite or negative, or when the file's
    tables are not bitsandbytes' own.
    """
    if int8.beside(name, "SCB") in tensors:
        return in_8_bits(int8.from_file(tensors, name))
    format = next((f for f in _FOUR_BITS if f"{name}.{_STATE}{f}" in tensors), None)
    if format is None:
        raise InputError(f"{name} has no {_STATE}nf4 or {_STATE}fp4 beside it: not a bitsandbytes 4-bit weight")
    try:
        state = loads(np.asarray(tensors[f"{name}.{_STATE}{format}"], np.uint8).tobytes())
        out_features, in_features = (int(size) for size in state["shape"])
        block_size = int(state["blocksize"])
        double_quant = "nested_offset" in state
        nested_block = int(state.get("nested_blocksize", NESTED_BLOCK))
        offset = float(state["nested_offset"]) if double_quant else None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"{name}: its quant_state is not the JSON bitsandbytes writes ({error!r})") from error
    check_block_size(block_size)
    if nested_block != NESTED_BLOCK:
        raise InputError(
            f"{name}: nested blocksize {nested_block}; bitsandbytes writes {NESTED_BLOCK}, others are not supported"
        )
    n = out_features * in_features
    blocks = -(-n // block_size)
    codes = _part(tensors, name, name, np.uint8, -(-n // 2))
    absmax = _part(tensors, name, f"{name}.absmax", np.uint8 if double_quant else np.float32, blocks)
    _check_scales(absmax, f"{name}.absmax")
    _check_table(tensors, f"{name}.quant_map", codebook(format).values)
    nested_absmax = None
    if double_quant:
        nested_absmax = _part(tensors, name, f"{name}.nested_absmax", np.float32, -(-blocks // NESTED_BLOCK))
        _check_scales(nested_absmax, f"{name}.nested_absmax")
        with np.errstate(over="ignore"):  # infinity is refused
            _check_scales(np.asarray([offset], np.float32), f"nested_offset of {name}")
        _check_table(tensors, f"{name}.nested_quant_map", absmax_map())
    return QuantizedTensor(
        jax.device_put(_halves(codes, n)),
        jax.device_put(absmax),
        jax.device_put(nested_absmax),
        None if offset is None else jnp.float32(offset),
        shape=(out_features, in_features),
        format=format,
        block_size=block_size,
    )


def _interleave(halves: np.ndarray, n: int) -> np.ndarray:
    """Our bytes -> bitsandbytes': value 2j in the high nibble, 2j + 1 in the low one."""
    codes = np.concatenate([halves & 0xF, halves >> 4])  # an odd count's padding nibble is the last: kept
    return (codes[::2] << 4) | codes[1::2]


def _halves(interleaved: np.ndarray, n: int) -> np.ndarray:
    codes = np.stack([interleaved >> 4, interleaved & 0xF], axis=1).reshape(-1)
    half = (n + 1) // 2
    return codes[:half] | (codes[half:] << 4)


def _part(tensors: Mapping[str, np.ndarray], name: str, key: str, dtype: type, size: int) -> np.ndarray:
    if key not in tensors:
        raise InputError(f"{name}: its part {key} is missing")
    value = np.asarray(tensors[key])
    if value.dtype != dtype or value.size != size:
        raise InputError(f"{key} is {value.dtype} with {value.size} values; expected {np.dtype(dtype)} with {size}")
    return value.reshape(-1)


def _check_scales(scales: np.ndarray, name: str) -> None:
    """Raises InputError for float32 scales that no weight can have."""
    check_finite(scales, name, "a scale must be finite")
    if scales.dtype == np.float32 and (scales < 0).any():
        raise InputError(f"{name} holds {scales.min()}; a scale is not negative")


def _check_table(tensors: Mapping[str, np.ndarray], key: str, expected: tuple[float, ...]) -> None:
    table = tensors.get(key)
    if table is None or not np.array_equal(np.asarray(table, np.float32).reshape(-1), np.asarray(expected, np.float32)):
        raise InputError(f"{key} is missing or is not bitsandbytes' table; the codes would be read wrongly")
