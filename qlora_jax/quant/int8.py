"""LLM.int8(): a weight in 8 bits, and its keys in a checkpoint that transformers wrote with load_in_8bit.

A weight [O, I] is int8 codes [O, I] and one float32 scale a row [O]; there are no blocks and no second quantization of
scales. On disk, for a layer L: `L.weight` int8 [O, I], `L.SCB` float32 [O] and `L.weight_format` uint8 [] (0: rows in
order; older files have others, which only some GPUs could read). Source: bitsandbytes 0.50, `Linear8bitLt`.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import int8_matmul
from pallas_kernels.finite import largest_magnitude
from qlora_jax.errors import InputError

FORMAT = "int8"
THRESHOLD = 6.0  # magnitude from which an activation is an outlier (transformers' llm_int8_threshold)
CHUNK = 2**22  # values of a large weight that are in work at a time (one row at least)
PARTS = ("SCB", "weight_format")
_IN_ORDER = 0


@jax.jit
def quantize_packed(w: jax.Array) -> tuple[int8_matmul.Packed, jax.Array]:
    """w [O, I] -> its arrays, and float32 [] that is at most `largest()` where w is finite and float16 holds it.

    No more than some CHUNK values are in 32 bits at a time. The last turn begins early enough to be whole; what is done
    twice comes out the same.
    """
    O, I = w.shape
    step = min(O, max(1, CHUNK // I))

    def some(index: jax.Array, packed: int8_matmul.Packed) -> int8_matmul.Packed:
        start = jnp.minimum(index * step, O - step)
        rows = int8_matmul.quantize_rows(jax.lax.dynamic_slice(w, (start, 0), (step, I)))
        codes = jax.lax.dynamic_update_slice(packed.codes, rows.codes, (start, 0))
        return int8_matmul.Packed(codes, jax.lax.dynamic_update_slice(packed.absmax, rows.absmax, (start,)))

    if step == O:
        rows = int8_matmul.quantize_rows(w)
        packed = int8_matmul.Packed(rows.codes, rows.absmax)
    else:
        empty = int8_matmul.Packed(jnp.zeros((O, I), jnp.int8), jnp.zeros(O, jnp.float32))
        packed = jax.lax.fori_loop(0, -(-O // step), some, empty)
    return packed, largest_magnitude(packed.absmax)


def temporary_bytes(n: int) -> int:
    """Device memory that `quantize_packed` takes at most beside its n values and its results."""
    return 9 * min(n, CHUNK) + 2**21


def largest() -> float:
    """The largest magnitude that a weight may have: float16's."""
    return int8_matmul.largest_float16()


def threshold_of(config: Mapping[str, Any], where: str) -> float:
    """Of a folder's config.json: from which magnitude on activations are outliers; the usual one where it says none."""
    value = (config.get("quantization_config") or {}).get("llm_int8_threshold", THRESHOLD)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InputError(
            f"{where}/config.json: llm_int8_threshold is {value!r}; expected a number, or 0 for no outliers"
        )
    return float(value)


def beside(key: str, part: str) -> str:
    """Where a part of a weight stands: ("a.weight", "SCB") -> "a.SCB"."""
    return key.removesuffix("weight") + part if f".{key}".endswith(".weight") else f"{key}.{part}"


def to_file(codes: jax.Array, absmax: jax.Array, key: str) -> dict[str, np.ndarray]:
    """The tensors of one weight under the keys that transformers reads."""
    order = np.asarray(_IN_ORDER, np.uint8)
    return {key: np.asarray(codes), beside(key, "SCB"): np.asarray(absmax), beside(key, "weight_format"): order}


def from_file(tensors: Mapping[str, np.ndarray], key: str) -> int8_matmul.Packed:
    """The other way, bit for bit. Raises InputError for a part that is missing, misshapen or cannot be."""
    scales_key, order_key = beside(key, "SCB"), beside(key, "weight_format")
    codes, scales, order = tensors.get(key), tensors.get(scales_key), tensors.get(order_key)
    if codes is None or scales is None:
        raise InputError(f"{key if codes is None else scales_key} is missing: not a weight in 8 bits")
    if codes.dtype != np.int8 or codes.ndim != 2:
        raise InputError(f"{key} is {codes.dtype} {list(codes.shape)}; expected int8 [out, in]")
    if scales.dtype != np.float32 or scales.size != len(codes):
        raise InputError(
            f"{scales_key} is {scales.dtype} with {scales.size} values; expected float32 with {len(codes)}"
        )
    if order is not None and np.any(order != _IN_ORDER):
        raise InputError(
            f"{order_key} is {np.ravel(order)[0]}, some GPUs' own order; {_IN_ORDER} (rows in order) is "
            "read: write the model again with bitsandbytes 0.45 or later"
        )
    scales = scales.reshape(-1)
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise InputError(f"{scales_key} holds NaN, infinity or a negative number; a scale must be finite")
    return int8_matmul.Packed(*jax.device_put((codes, scales)))
