"""The op: y = x W^T for W in 8 bits, differentiable in x, with the packed arrays as its only residuals.

    y = x_in W^T + x_out W^T        x_in: columns of x without an outlier, in 8 bits; x_out: the others, as they are

The first product is of int8 with int8 into int32, exact; the second is small: of real models' thousands of features a
handful holds values of `threshold` and more. Which columns these are depends on all rows of x, as in bitsandbytes.
The gradient is that of x W^T with W dequantized: dx = dy W in x's dtype.
Source: LLM.int8() (Dettmers et al., 2022); bitsandbytes 0.50, `MatMul8bitLt`. Two roundings of the result to x's dtype
are left out here (of each product before they are added), and the weights of the second product are exact.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.int8_matmul.rows import dequantize, quantize_rows
from pallas_kernels.nf4_matmul.api import over_rows
from pallas_kernels.nf4_matmul.dense import dense_matmul

FEW = 64  # outlier columns that are taken out of x and W; where there are more, W is taken whole

STEPS = 1 / 127**2  # what a product of two codes is of that of their scales


class Packed(NamedTuple):
    """The arrays of one weight [O, I]; see rows.py."""

    codes: jax.Array  # int8 [O, I]
    absmax: jax.Array  # float32 [O]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul_joined(x: jax.Array, packed: tuple[Packed, ...], threshold: float) -> jax.Array:
    """What several weights [O_k, I] make of one x, side by side.

    Args:
      x: [..., I], float32, bfloat16 or float16.
      packed: the weights.
      threshold: magnitude from which a value of x is an outlier; 0: none is.
    Returns:
      [..., sum of O_k] in x's dtype. A row of x with NaN gives a row of NaN.
    Raises:
      ValueError: x's last dimension is not I.
    """
    for each in packed:
        if x.shape[-1] != each.codes.shape[1]:
            shape = list(each.codes.shape)
            raise ValueError(f"x has {x.shape[-1]} features, the weight [out, in] = {shape} takes {shape[1]}")
    rows = x.reshape(-1, x.shape[-1])
    quantized = quantize_rows(rows, threshold)
    codes = tuple(each.codes for each in packed)
    y = jnp.concatenate([_product(quantized.codes, each) for each in codes], axis=-1).astype(jnp.float32)
    y = y * (quantized.absmax[:, None] * STEPS)
    if threshold:
        outliers = jnp.where(quantized.columns, rows, jnp.zeros((), x.dtype))
        y = y + _outlier_product(outliers, codes) * (1 / 127)
    y = (y * jnp.concatenate([each.absmax for each in packed])).astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """int8 [M, I], [O, I] -> int32 [M, O]."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


def _outlier_product(x: jax.Array, codes: tuple[jax.Array, ...]) -> jax.Array:
    """x [M, I], zero but for its outlier columns, times codes of several weights [O_k, I] -> float32 [M, sum of O_k].

    The members of a pack are rows of one product: a choice that hung on a member would be made by computing both ways.
    """
    return over_rows(_of_rows, ())(x, codes)


def _of_rows(x: jax.Array, codes: tuple[jax.Array, ...], _: tuple) -> jax.Array:
    def product(x: jax.Array, codes: Sequence[jax.Array]) -> jax.Array:  # an int8 is exact in 16 bits
        each = [dense_matmul(x, w.astype(x.dtype), 1, jnp.float32) for w in codes]
        return jnp.concatenate(each, axis=-1)

    if x.shape[-1] <= FEW:
        return product(x, codes)
    is_used = jnp.any(x != 0, axis=0)

    def few() -> jax.Array:
        _, index = jax.lax.top_k(is_used.astype(jnp.float32), FEW)  # others among them meet zeros of x
        # the barrier: with bfloat16 taken out by columns XLA:CPU compiles a product that it cannot run
        return product(*jax.lax.optimization_barrier((x[:, index], [w[:, index] for w in codes])))

    return jax.lax.cond(jnp.sum(is_used) <= FEW, few, lambda: product(x, codes))


def _forward(x, packed, threshold):
    return matmul_joined(x, packed, threshold), packed


def _backward(threshold, packed, dy):
    """dx [..., I]. No weight is dequantized before dy is there: its scales wait for that."""
    dy, absmax = jax.lax.optimization_barrier((dy, [each.absmax for each in packed]))
    w = [dequantize(each.codes, scale, dy.dtype) for each, scale in zip(packed, absmax, strict=True)]
    joined = w[0] if len(w) == 1 else jax.lax.optimization_barrier(jnp.concatenate(w))
    return dense_matmul(dy, joined, contract=0), None


matmul_joined.defvjp(_forward, _backward)
