"""Our own form on disk: the packed arrays as they are in memory, under the weight's Hugging Face name.

For a weight P: `P.codes` uint8, `P.absmax` uint8 or float32, with double quantization `P.nested_absmax` float32 and
`P.offset` float32 [], and `P.meta`, uint8 bytes of JSON {format, block_size, shape}. The folder's config.json says the
same once: quantization_config {quant_method, format, block_size, double_quant}. The arrays are QuantizedTensor's.
"""

import json
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from pallas_kernels.nf4_matmul import NESTED_BLOCK
from qlora_jax.errors import InputError
from qlora_jax.quant.codebooks import codebook
from qlora_jax.quant.tensor import QuantizedTensor, check_block_size

METHOD = "qlora_jax"
_PARTS = ("codes", "absmax", "nested_absmax", "offset", "meta")


def part_of(key: str) -> str | None:
    """The weight a file's key belongs to ("a.weight.codes" -> "a.weight"); None for other keys."""
    name, _, part = key.rpartition(".")
    return name if part in _PARTS else None


def to_native(q: QuantizedTensor, name: str) -> dict[str, np.ndarray]:
    """The tensors of q under our keys."""
    meta = json.dumps({"format": q.format, "block_size": q.block_size, "shape": list(q.shape)})
    parts = {"codes": q.codes, "absmax": q.absmax, "nested_absmax": q.nested_absmax, "offset": q.offset}
    tensors = {f"{name}.{part}": np.asarray(value) for part, value in parts.items() if value is not None}
    return tensors | {f"{name}.meta": np.frombuffer(meta.encode(), np.uint8).copy()}


def from_native(tensors: Mapping[str, np.ndarray], name: str) -> QuantizedTensor:
    """Reads what `to_native` wrote. Raises InputError when a part is missing, misshapen or of another dtype."""
    try:
        meta = json.loads(np.asarray(tensors[f"{name}.meta"], np.uint8).tobytes())
        format, block_size, (out_features, in_features) = meta["format"], int(meta["block_size"]), meta["shape"]
        codes, absmax = tensors[f"{name}.codes"], tensors[f"{name}.absmax"]
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{name}: its packed parts are incomplete or damaged ({error!r})") from error
    codebook(format)
    check_block_size(block_size)
    nested, offset = tensors.get(f"{name}.nested_absmax"), tensors.get(f"{name}.offset")
    blocks = -(-out_features * in_features // block_size)
    expected = {
        "codes": (codes, np.uint8, -(-out_features * in_features // 2)),
        "absmax": (absmax, np.float32 if nested is None else np.uint8, blocks),
        "nested_absmax": (nested, np.float32, -(-blocks // NESTED_BLOCK)),
        "offset": (offset, np.float32, 1),
    }
    for part, (value, dtype, size) in expected.items():
        if value is None and (nested is None and offset is None):
            continue
        if value is None or value.dtype != dtype or value.size != size:
            found = "missing" if value is None else f"{value.dtype} with {value.size} values"
            raise InputError(f"{name}.{part} is {found}; expected {np.dtype(dtype)} with {size}")
    return QuantizedTensor(
        jnp.asarray(codes),
        jnp.asarray(absmax),
        None if nested is None else jnp.asarray(nested),
        None if offset is None else jnp.asarray(offset),
        shape=(out_features, in_features),
        format=format,
        block_size=block_size,
    )
