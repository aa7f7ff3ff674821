"""A matrix in 8 bits, each row with a scale of its own: what the arrays mean, and how they are made.

    absmax = max |w|,  code = round(w * (1 / absmax * 127)) in -127..127,  w ~ code * absmax / 127

Each step is rounded to float32, halves to even; a row of zeros has scale 0. (1 / absmax * 127 is what torch makes of
127 / absmax. On GPUs bitsandbytes divides approximately: a value in the middle may get the other code there.) Values
are taken as float16, whatever holds them: bitsandbytes casts to it whatever it quantizes to 8 bits.
Source: bitsandbytes 0.50, `int8_vectorwise_quant`, `Int8Params`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.finite import largest_magnitude

_LARGEST_CODE = 127.0
_SMALLEST_NORMAL, _STEP = 2.0**-14, 2.0**-24  # of float16, and between its subnormal numbers


class Rows(NamedTuple):
    """A matrix [M, I] in 8 bits."""

    codes: jax.Array  # int8 [M, I]; 0 in columns with an outlier
    absmax: jax.Array  # float32 [M], of the values that are no outliers
    columns: jax.Array  # bool [I], those with an outlier in any row


def largest_float16() -> float:
    return float(jnp.finfo(jnp.float16).max)


def quantize_rows(x: jax.Array, threshold: float = 0.0) -> Rows:
    """x [M, I] any float dtype -> 8 bits.

    Values of magnitude `threshold` and more are outliers (none where it is 0): they count for no scale, and all of
    their columns is left out of the codes. A row with NaN, or without a threshold with infinity, has scale infinity.
    """
    x = as_float16(x)
    columns = jnp.zeros(x.shape[-1], bool)
    if threshold:
        is_outlier = jnp.abs(x) >= threshold
        columns, x = jnp.any(is_outlier, axis=0), jnp.where(is_outlier, 0.0, x)
    absmax = largest_magnitude(x, axis=-1)
    # the barriers keep XLA from dividing 127, or the values, instead
    reciprocal = jax.lax.optimization_barrier(1 / jnp.where(absmax == 0, 1.0, absmax))
    scale = jax.lax.optimization_barrier(reciprocal * _LARGEST_CODE)
    codes = jnp.where(columns, 0.0, jnp.round(x * scale[:, None]))
    return Rows(codes.astype(jnp.int8), absmax, columns)


def as_float16(x: jax.Array) -> jax.Array:
    """float32 of x's values as float16 has them; those that overflow there stay what they are.

    In float32 arithmetic: of two conversions XLA may leave both out, and reduce_precision knows no subnormal numbers.
    """
    x32 = x.astype(jnp.float32)
    if x.dtype == jnp.float16:
        return x32
    normal = jax.lax.reduce_precision(x32, exponent_bits=5, mantissa_bits=10)
    normal = jnp.where(jnp.isinf(normal), x32, normal)
    return jnp.where(jnp.abs(x32) < _SMALLEST_NORMAL, jnp.round(x32 * (1 / _STEP)) * _STEP, normal)


def dequantize(codes: jax.Array, absmax: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """W [O, I]: code * absmax / 127 in float32, rounded once to dtype (bitsandbytes' `int8_vectorwise_dequant`)."""
    return (codes.astype(jnp.float32) * absmax[:, None] * (1 / _LARGEST_CODE)).astype(dtype)
