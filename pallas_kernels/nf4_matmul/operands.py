"""A packed weight as the op takes it: its arrays, what is fixed about it, and what they mean.

What makes a weight of its arrays is jitted: of all products of a program, forward and backward, weights of one shape
are traced and lowered once. Written out each time, that was half of what tracing a step took. The compiler inlines it.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.nf4_matmul import reference


class Codec(NamedTuple):
    """What is fixed when a program is compiled. Tables are tuples so that a codec can be hashed."""

    shape: tuple[int, int]  # (O, I)
    block_size: int  # values that share one absmax
    table: tuple[float, ...]  # 16 values
    absmax_map: tuple[float, ...]  # 256 values, read only with double quantization
    backend: str = "xla"  # one of api.BACKENDS


class Packed(NamedTuple):
    """The arrays of one weight; see reference.py for the layout."""

    codes: jax.Array  # uint8 [ceil(O * I / 2)]
    absmax: jax.Array  # float32 [C'], or uint8 [C'] with double quantization
    nested_absmax: jax.Array | None  # float32 [ceil(C' / 256)]; of a part of a weight more (reference.nested_block)
    offset: jax.Array | None  # float32 []


@partial(jax.jit, static_argnames="codec")
def scales(packed: Packed, codec: Codec) -> jax.Array:
    """float32 [C'], of each block."""
    absmax_map = np.asarray(codec.absmax_map, np.float32)
    return reference.dequantize_absmax(packed.absmax, packed.nested_absmax, packed.offset, absmax_map)


def are_alike(packed: Sequence[Packed], codecs: Sequence[Codec]) -> bool:
    """Whether weights differ in their out-features alone, so that one program can multiply x by any of them."""
    kinds = {
        (codec._replace(shape=(0, codec.shape[1])), one.nested_absmax is None)
        for one, codec in zip(packed, codecs, strict=True)
    }
    return len(kinds) == 1


def for_kernels(packed: Packed, codec: Codec) -> Packed:
    """With scales as kernels read them: nested ones are of 256 scales each, or there are none."""
    nested, blocks = packed.nested_absmax, packed.absmax.shape[0]
    if nested is None or reference.nested_block(blocks, nested.shape[0]) == reference.NESTED_BLOCK:
        return packed
    return Packed(packed.codes, scales(packed, codec), None, None)


@partial(jax.jit, static_argnames=("codec", "dtype"))
def scaled(codes: jax.Array, absmax: jax.Array, codec: Codec, dtype: jnp.dtype) -> jax.Array:
    """W [O, I] in dtype of its codes and of what `scales` gives."""
    table = np.asarray(codec.table, np.float32)
    return reference.dequantize(codes, absmax, table, codec.shape, codec.block_size, dtype)


def dequantize(packed: Packed, codec: Codec, dtype: jnp.dtype) -> jax.Array:
    """W [O, I] in dtype, bit-exact with bitsandbytes' definition."""
    return scaled(packed.codes, scales(packed, codec), codec, dtype)
