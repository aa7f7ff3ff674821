"""Our own form on disk: a projection's packed arrays as the device holds them, all layers of a model in one array.

For a projection P of L layers: `model.layers.P.weight.codes` uint8 [L, ceil(O * I / 2)], `.absmax` [L, C'] uint8 or
float32, with double quantization `.nested_absmax` float32 [L, ceil(C' / 256)] and `.offset` float32 [L]: the arrays of
QuantizedTensor, so that loading is one read in order for each. What they mean stands in the folder's config.json:
quantization_config {quant_method, layout, format, block_size, double_quant}; O and I follow from its sizes. In format
"int8" codes are int8 [L, O, I] and absmax float32 [L, O], and there is a llm_int8_threshold as transformers has it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import int8_matmul
from pallas_kernels.nf4_matmul import NESTED_BLOCK
from qlora_jax.errors import InputError
from qlora_jax.quant import int8
from qlora_jax.quant.tensor import QuantizedTensor, check_block_size, in_8_bits

METHOD = "qlora_jax"
LAYOUT = 2  # of the arrays above; in layout 1 every layer had arrays of its own
PARTS = ("codes", "absmax", "nested_absmax", "offset")
_STACK = "model.layers.{}.weight.{}"


def stack_key(projection: str, part: str) -> str:
    """("mlp.up_proj", "codes") -> "model.layers.mlp.up_proj.weight.codes"."""
    return _STACK.format(projection, part)


def is_stack(key: str) -> bool:
    """Whether a file's key is one of ours."""
    begin, end = _STACK.partition("{}")[0], tuple(f".weight.{part}" for part in PARTS)
    return key.startswith(begin) and key.endswith(end) and not key.split(".")[2].isdigit()


def settings(format: str, block_size: int, double_quant: bool) -> dict[str, Any]:
    """quantization_config of config.json."""
    return {
        "quant_method": METHOD,
        "layout": LAYOUT,
        "format": format,
        "block_size": block_size,
        "double_quant": double_quant,
    }


def read_settings(raw: dict[str, Any], where: str) -> tuple[str, int, bool]:
    """(format, block_size, double_quant) of a quantization_config that `settings` made.

    Raises InputError when it is half there, or of a layout that is not read.
    """
    if raw.get("layout", 1) != LAYOUT:
        raise InputError(
            f"{where}: quantization_config is of layout {raw.get('layout', 1)!r}, this version reads {LAYOUT}: "
            "quantize the original again by experiments.quantize"
        )
    lacking = [key for key in ("format", "block_size", "double_quant") if key not in raw]
    if lacking:
        raise InputError(f"{where}: quantization_config lacks {', '.join(lacking)}")
    return raw["format"], raw["block_size"], raw["double_quant"]


def abstract(shape: tuple[int, ...], format: str, block_size: int, double_quant: bool) -> QuantizedTensor:
    """A quantized [O, I] with shapes and dtypes in place of arrays, as `quantize` would make it.

    Said here, not traced: tracing takes 40 ms a shape, of which a plan of many models has hundreds. Raises InputError
    for a block size that there is not.
    """
    array: Any = jax.ShapeDtypeStruct
    if format == int8.FORMAT:
        return in_8_bits(int8_matmul.Packed(array(shape, jnp.int8), array(shape[:1], jnp.float32)))
    check_block_size(block_size)
    weights = math.prod(shape)
    scales = -(-weights // block_size)
    codes, absmax = array((-(-weights // 2),), jnp.uint8), array((scales,), jnp.float32)
    nested: tuple[Any, Any] = (None, None)
    if double_quant:
        absmax = array((scales,), jnp.uint8)
        nested = (array((-(-scales // NESTED_BLOCK),), jnp.float32), array((), jnp.float32))
    return QuantizedTensor(codes, absmax, *nested, shape=(shape[0], shape[1]), format=format, block_size=block_size)


def filled(q: QuantizedTensor, arrays: Mapping[str, jax.Array]) -> QuantizedTensor:
    """q with the arrays of its parts."""
    nested, offset = arrays.get("nested_absmax"), arrays.get("offset")
    return dataclasses.replace(q, codes=arrays["codes"], absmax=arrays["absmax"], nested_absmax=nested, offset=offset)


def parts(q: QuantizedTensor) -> dict[str, Any]:
    """Its arrays (or their shapes) under the names of their parts."""
    arrays = {"codes": q.codes, "absmax": q.absmax, "nested_absmax": q.nested_absmax, "offset": q.offset}
    return {part: value for part, value in arrays.items() if value is not None}
