"""Products with weights in 16 or 32 bits, as XLA computes them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dense_matmul(x: jax.Array, w: jax.Array, contract: int, dtype: Any = None) -> jax.Array:
    """x [..., K] times w over w's dimension `contract`, summed in float32; float32 inputs are not rounded to TF32.

    The result is of `dtype`, or x's. Its gradient's products take operands of x's dtype too: left to JAX, a float32
    cotangent would meet w in 16 bits, and XLA:GPU would write w out in 32.
    """
    y = _dot(_rows(x), w, (((1,), (contract,)), ((), ())))
    return y.astype(dtype or x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def _dense_forward(x, w, contract, dtype):
    return dense_matmul(x, w, contract, dtype), (x, w)


def _dense_backward(contract, dtype, residuals, dy):
    x, w = residuals
    dy, rows = _rows(dy.astype(x.dtype)), _rows(x)
    dx = _dot(dy, w, (((1,), (1 - contract,)), ((), ()))).astype(x.dtype)
    left, right = (dy, rows) if contract == 1 else (rows, dy)
    return dx.reshape(x.shape), _dot(left, right, (((0,), (0,)), ((), ()))).astype(w.dtype)


dense_matmul.defvjp(_dense_forward, _dense_backward)


@jax.custom_vjp
def batched_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [P, M, K] times w [P, N, K] over K, each of P: [P, M, N] in x's dtype, as dense_matmul."""
    return _dot(x, w, (((2,), (2,)), ((0,), (0,)))).astype(x.dtype)


def _batched_backward(residuals, dy):
    x, w = residuals
    dx = _dot(dy, w, (((2,), (1,)), ((0,), (0,)))).astype(x.dtype)
    return dx, _dot(dy, x, (((1,), (1,)), ((0,), (0,)))).astype(w.dtype)


batched_matmul.defvjp(lambda x, w: (batched_matmul(x, w), (x, w)), _batched_backward)


def _rows(x: jax.Array) -> jax.Array:
    """x [..., K] -> [M, K]: of two axes of rows XLA:GPU lays arrays out anew for the gradient of w."""
    return x.reshape(-1, x.shape[-1])


def _dot(a: jax.Array, b: jax.Array, dims: Any) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
