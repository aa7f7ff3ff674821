"""The 4-bit weight in plain JAX: what its arrays mean. Every kernel must agree with this file.

Layout, one for every shape: W [O, I] is flattened row-major to n = O * I values. Byte j of `codes` holds value j in its
low nibble and value j + ceil(n / 2) in its high nibble (for an odd n the last high nibble is padding). Where O is even
these are rows o and o + O / 2 of one column: a tile of bytes gives two tiles of weights that meet the same tile of x,
and nothing is interleaved.

Scales: each run of `block_size` values shares one absmax; runs cross rows, and the last may be short. Double
quantization stores the absmax in 8 bits: absmax = map[code] * nested_absmax[block // 256] + offset. In a part of a
weight, whose runs begin anywhere in the whole, a nested scale is of a divisor of 256 scales, which the shapes tell.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

NESTED_BLOCK = 256  # scales that share one nested scale (paper, section 3; bitsandbytes' nested_blocksize)


def unpack(codes: jax.Array, n: int) -> jax.Array:
    """uint8 [ceil(n / 2)] -> the n codes 0..15 in order, uint8 [n]."""
    return jnp.concatenate([codes & 0xF, codes >> 4])[:n]


def nested_block(blocks: int, nested: int) -> int:
    """Scales that share one nested scale, of so many of both."""
    return NESTED_BLOCK if nested == -(-blocks // NESTED_BLOCK) else blocks // nested


def dequantize_absmax(
    absmax: jax.Array, nested_absmax: jax.Array | None, offset: jax.Array | None, absmax_map: np.ndarray
) -> jax.Array:
    """Scales as float32 [C'], C' = ceil(O * I / block_size).

    The product is rounded before the offset is added, as bitsandbytes does: contracted into one fused multiply-add, the
    two differ in the last bit for a quarter of all scales. On a CPU a barrier keeps them apart. On a GPU it would also
    keep them in two kernels: there it is a choice whose condition always holds, which the compiler does not know.
    """
    if nested_absmax is None or offset is None:
        return absmax
    blocks = absmax.shape[0]
    nested = jnp.repeat(nested_absmax, nested_block(blocks, nested_absmax.shape[0]))[:blocks]
    mapped = jnp.asarray(absmax_map)[absmax.astype(jnp.int32)]
    largest = float(np.max(absmax_map))
    product = jax.lax.platform_dependent(
        mapped,
        nested,
        cpu=lambda mapped, nested: jax.lax.optimization_barrier(mapped * nested),
        default=lambda mapped, nested: rounded_product(mapped, nested, largest),
    )
    return product + jnp.broadcast_to(offset, product.shape)


def rounded_product(mapped: jax.Array, nested: jax.Array, largest: float) -> jax.Array:
    """mapped * nested, that no compiler contracts with what is added; mapped is at most `largest`, which none knows."""
    return jnp.where(mapped <= largest, mapped * nested, 0.0)


def dequantize(
    codes: jax.Array,
    absmax: jax.Array,
    table: np.ndarray,
    shape: Sequence[int],
    block_size: int,
    dtype: jnp.dtype,
) -> jax.Array:
    """codes uint8 [ceil(n / 2)], absmax float32 [C'] -> W [O, I]: table[code] * absmax in float32, rounded to dtype."""
    n = int(np.prod(shape))
    half = codes.shape[0]
    low, high = _lookup(codes & 0xF, table), _lookup(codes >> 4, table)
    if n % 2 == 0 and half % block_size == 0:  # no block crosses the middle: scale the halves before they meet
        blocks = half // block_size
        low = low.reshape(blocks, block_size) * absmax[:blocks, None]
        high = high.reshape(blocks, block_size) * absmax[blocks:, None]
        values = jnp.concatenate([low, high]).reshape(n)
    else:
        values = jnp.concatenate([low, high])[:n]
        padded = jnp.pad(values, (0, absmax.shape[0] * block_size - n))
        values = (padded.reshape(-1, block_size) * absmax[:, None]).reshape(-1)[:n]
    values = values.astype(dtype)
    return jnp.where(values == 0, jnp.zeros((), dtype), values).reshape(shape)  # -0 becomes +0


def _lookup(codes: jax.Array, table: np.ndarray) -> jax.Array:
    """table[codes], float32. A tree of selects vectorizes on CPUs; elsewhere XLA fuses a gather, but not the tree."""
    return jax.lax.platform_dependent(
        codes, cpu=lambda c: _select_tree(c, table), default=lambda c: jnp.asarray(table)[c]
    )


def _select_tree(codes: jax.Array, table: np.ndarray) -> jax.Array:
    level = [jnp.float32(value) for value in table]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        level = [jnp.where(is_set, odd, even) for even, odd in zip(level[::2], level[1::2], strict=True)]
    return level[0]
