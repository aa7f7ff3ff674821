"""The 8-bit forms of the product, compute "fp8" and "fp8_row": what they mean, in plain JAX. Their kernel must agree.

Both operands are float8_e4m3fn, the tensor cores' 8-bit type from Ada and Hopper on (3 bits of mantissa, largest 448):

    fp8       y[m, o] = sum over runs c of  x_scale[m, c] * absmax[o, c] * (sum over i in c of  x8[m, i] * w8[o, i])
    fp8_row   y[m, o] = x_scale[m] * sum over runs c of  absmax[o, c] * (sum over i in c of  x8[m, i] * w8[o, i])

with w8[o, i] = table8[code[o, i]]. A run is min(64, block_size) in-features: one scale of W holds for all of it, and of
x too in "fp8", where "fp8_row" has one for a whole row. Sums are float32.

W: the 16 entries are rounded once, so that codes are looked up straight to 8 bits. Before that the table is multiplied
by one factor, which is taken out of x_scale again: the largest entry becomes one of the eight 8-bit values from 240 to
448, whichever leaves the least error. Root mean square on normal weights, relative to theirs: 2.0% for nf4 (at 448),
none for fp4 (at 240: its entries are small multiples of 1/12) and int4 (at 448). A power of two would leave 2.3%, 2.1%
and 2.2%; 448 for all would leave 2.4% on fp4.
x: divided by amax / 448 of its row's run, or of its whole row, and rounded; 2.5% and 2.65% root mean square on normal
activations. The type is a float: its error is relative, so that longer runs cost little, but only from amax / 28,672
on. Below, steps are amax / 229,376: values are lost beside a larger one that shares their scale. Beside one 10,000
times as large as normal activations they are off by 2.7% with a row's scale, beside 100,000 times by 13%.

Forward only. In dx = dy W the scale of a block changes along the summed dimension, so that it cannot be taken out of
8-bit products; the gradient is the full-precision one, of the full-precision product.
"""

from collections.abc import Sequence
from functools import cache

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.finite import largest_magnitude
from pallas_kernels.nf4_matmul import reference
from pallas_kernels.nf4_matmul.operands import Codec, Packed

RUN = 64  # in-features that share a scale of W, and in "fp8" of x; fewer where blocks are smaller
LARGEST = 448.0  # of float8_e4m3fn
LARGEST_ENTRY = (240.0, 256.0, 288.0, 320.0, 352.0, 384.0, 416.0, 448.0)  # the last eight values of float8_e4m3fn
TINY = float(np.finfo(np.float32).tiny)  # a scale below would be flushed to zero


def run_length(codec: Codec) -> int:
    """In-features that share a scale of x: all, or else as many as divide the block size, a power of two from 32."""
    return codec.shape[1] if codec.compute == "fp8_row" else min(RUN, codec.block_size)


@cache
def table8(table: Sequence[float]) -> tuple[np.ndarray, float]:
    """The table in 8 bits: (float8_e4m3fn [16], factor), with table = entries / factor but for the rounding.

    Args:
      table: 16 finite values in a tuple, not all 0.
    """
    exact = np.asarray(table, np.float64)
    factors = [largest / np.abs(exact).max() for largest in LARGEST_ENTRY]
    rounded = [(exact * factor).astype(np.float32).astype(ml_dtypes.float8_e4m3fn) for factor in factors]
    errors = [
        float(np.sum((entries.astype(np.float64) / factor - exact) ** 2))
        for entries, factor in zip(rounded, factors, strict=True)
    ]
    best = int(np.argmin(errors))
    return rounded[best], factors[best]


def quantize(x: jax.Array, run: int) -> tuple[jax.Array, jax.Array]:
    """x [M, I] in 8 bits: (float8_e4m3fn [M, I], float32 scales [M, ceil(I / run)]), x = values * scale of their run.

    The largest magnitude of a run becomes 448; a run of zeros stays zeros. One NaN or inf makes its whole run NaN.
    """
    rows, in_features = x.shape
    scales_per_row = -(-in_features // run)
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, scales_per_row * run - in_features)))
    runs = padded.reshape(rows, scales_per_row, run)
    amax = largest_magnitude(runs, axis=-1)
    scales = jnp.where(jnp.isfinite(amax), jnp.maximum(amax * (1 / LARGEST), TINY), jnp.nan)
    values = (runs / scales[..., None]).astype(jnp.float8_e4m3fn)
    return values.reshape(padded.shape)[:, :in_features], scales


def forward(x: jax.Array, packed: Packed, codec: Codec) -> jax.Array:
    """y [M, O] = x [M, I] W^T in x's dtype, both operands rounded to 8 bits: every device, every shape.

    The scales are multiplied into float32 operands: they are the same for all of a run, so that only the order of
    float32 roundings tells this from scaling the runs' sums. It holds W in float32; it is no faster than "full".
    """
    run = run_length(codec)
    values, scales = quantize(x, run)
    x_rounded = values.astype(jnp.float32) * jnp.repeat(scales, run, axis=1)[:, : x.shape[1]]
    w = dequantize(packed, codec)
    dims = (((1,), (1,)), ((), ()))
    y = jax.lax.dot_general(x_rounded, w, dims, precision=jax.lax.Precision.HIGHEST)
    return y.astype(x.dtype)


def dequantize(packed: Packed, codec: Codec) -> jax.Array:
    """W [O, I] float32 as the 8-bit product sees it: from the rounded table."""
    absmax_map = np.asarray(codec.absmax_map, np.float32)
    absmax = reference.dequantize_absmax(packed.absmax, packed.nested_absmax, packed.offset, absmax_map)
    entries, factor = table8(codec.table)
    table = (entries.astype(np.float64) / factor).astype(np.float32)
    return reference.dequantize(packed.codes, absmax, table, codec.shape, codec.block_size, jnp.float32)
