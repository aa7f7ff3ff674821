"""Products with weights in 16 or 32 bits, as XLA computes them; the low-rank term of an adapter is two of them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dense_matmul(x: jax.Array, w: jax.Array, contract: int, dtype: Any = None) -> jax.Array:
    """x [..., K] times w over w's dimension `contract`, summed in float32; float32 inputs are not rounded to TF32.

    The result is of `dtype`, or x's. Its gradient's products take operands of x's dtype too: left to JAX, a float32
    cotangent would meet w in 16 bits, and XLA:GPU would write w out in 32.
    """
    return _dot(x, w, (((x.ndim - 1,), (contract,)), ((), ()))).astype(dtype or x.dtype)


def _dense_forward(x, w, contract, dtype):
    return dense_matmul(x, w, contract, dtype), (x, w)


def _dense_backward(contract, dtype, residuals, dy):
    x, w = residuals
    rows = tuple(range(x.ndim - 1))
    dy = dy.astype(x.dtype)
    dx = _dot(dy, w, (((x.ndim - 1,), (1 - contract,)), ((), ()))).astype(x.dtype)
    operands = (dy, x) if contract == 1 else (x, dy)
    return dx, _dot(*operands, ((rows, rows), ((), ()))).astype(w.dtype)


dense_matmul.defvjp(_dense_forward, _dense_backward)


def low_rank_term(dropped: jax.Array, a: jax.Array, b: jax.Array, scale: float | jax.Array) -> jax.Array:
    """scale * dropped A^T B^T: dropped [..., I], A [R, I], B [O, R] -> [..., O] in dropped's dtype.

    A and B are rounded to that dtype, and so is every product. What A gives, [..., R], is named "low_rank": small, and
    worth keeping for the backward pass.
    """
    low_rank = checkpoint_name(dense_matmul(dropped, a.astype(dropped.dtype), contract=1), "low_rank")
    return dense_matmul(low_rank, b.astype(dropped.dtype), contract=1) * jnp.asarray(scale, dropped.dtype)


def _dot(a: jax.Array, b: jax.Array, dims: Any) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
