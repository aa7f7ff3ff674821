"""The op with an adapter: y = x W^T + scale * dropped A^T B^T, where dropped is x or dropout(x).

`plain` is the definition: the 4-bit product and two small ones beside it. Where the codec says fuse_lora, the Triton
kernels add the last product to their sums before they round and store them: u = scale * dropped A^T [M, R] is a small
product of XLA's, and one kernel computes x W^T + u B^T. Backward, with du = scale * dy B, one kernel computes
dy W + du A; behind a dropout du A must meet the mask first and stays apart. A vmap over adapters (a pack: x, A and B
batched, W not) makes their rows the rows of the same kernel. Residuals are the packed arrays, dropped, A, B and u.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.nf4_matmul import api
from pallas_kernels.nf4_matmul.api import matmul
from pallas_kernels.nf4_matmul.dense import dense_matmul
from pallas_kernels.nf4_matmul.operands import Codec, Packed
from pallas_kernels.nf4_matmul.triton import backend as triton_backend


def matmul_lora(
    x: jax.Array,
    packed: Packed,
    codec: Codec,
    a: jax.Array,
    b: jax.Array,
    scale: float | jax.Array,
    dropped: jax.Array | None = None,
) -> jax.Array:
    """y = x W^T + scale * dropped A^T B^T, differentiable in x, dropped, a and b.

    Args:
      x: [..., I], float32 or bfloat16 or float16.
      packed, codec: the weight, as `matmul` takes it; codec.fuse_lora asks for the fused form, which weights that the
        kernels refuse do without (api.path tells which).
      a, b: A [R, I] and B [O, R], float32; they are rounded to x's dtype. Any R.
      scale: of the adapter's output. The fused form has no gradient for it.
      dropped: dropout(x), like x; None is x itself.
    Returns:
      [..., O] in x's dtype. The fused form rounds u and the result alone; `plain` rounds each product.
    Raises:
      ValueError: shapes do not fit, or fuse_lora with a backend that has no fused form.
    """
    _check_shapes(x, codec, a, b, dropped)
    if not is_fused(codec, x.dtype):
        return plain(x, packed, codec, a, b, scale, dropped)
    return _matmul_lora(x, dropped, a, b, jnp.asarray(scale, jnp.float32), packed, codec)


def is_fused(codec: Codec, dtype: jnp.dtype) -> bool:
    """Whether `matmul_lora` takes the fused form. Raises ValueError for fuse_lora where there is no fused form."""
    if not codec.fuse_lora:
        return False
    if codec.backend != "triton":
        raise ValueError(f'fuse_lora needs backend "triton", found {codec.backend!r}: choose that, or leave it off')
    return api.path(codec, dtype) == "triton"


def plain(
    x: jax.Array,
    packed: Packed,
    codec: Codec,
    a: jax.Array,
    b: jax.Array,
    scale: float | jax.Array,
    dropped: jax.Array | None = None,
) -> jax.Array:
    """`matmul_lora` by three products; what the fused form is tested against."""
    return matmul(x, packed, codec) + low_rank_term(x if dropped is None else dropped, a, b, scale)


def low_rank_term(dropped: jax.Array, a: jax.Array, b: jax.Array, scale: float | jax.Array) -> jax.Array:
    """scale * dropped A^T B^T: dropped [..., I] -> [..., O] in its dtype, every product rounded to it."""
    low_rank = dense_matmul(dropped, a.astype(dropped.dtype), contract=1)
    return dense_matmul(low_rank, b.astype(dropped.dtype), contract=1) * jnp.asarray(scale, dropped.dtype)


def _check_shapes(x: jax.Array, codec: Codec, a: jax.Array, b: jax.Array, dropped: jax.Array | None) -> None:
    O, I = codec.shape
    R = a.shape[0]
    if x.shape[-1] != I:
        raise ValueError(f"x has {x.shape[-1]} features, the weight [out, in] = {[O, I]} takes {I}")
    if a.shape != (R, I) or b.shape != (O, R):
        raise ValueError(
            f"a {list(a.shape)} and b {list(b.shape)} do not fit the weight [out, in] = {[O, I]}: "
            f"expected [R, {I}] and [{O}, R]"
        )
    if dropped is not None and (dropped.shape, dropped.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"dropped is {dropped.dtype}{list(dropped.shape)}, expected {x.dtype}{list(x.shape)} as x, or None"
        )


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _matmul_lora(x, dropped, a, b, scale, packed, codec):
    return _forward(x, dropped, a, b, scale, packed, codec)[0]


def _forward(x, dropped, a, b, scale, packed, codec):
    u = _scaled(x if dropped is None else dropped, a.astype(x.dtype), scale, contract=1)
    y = _fused(triton_backend.forward_lora, codec)(x, u, b.astype(x.dtype), packed)
    return y, (x if dropped is None else None, dropped, u, a, b, scale, packed)


def _backward(codec, residuals, dy):
    x, dropped, u, a, b, scale, packed = residuals
    adapted = x if dropped is None else dropped
    du = _scaled(dy, b.astype(dy.dtype), scale, contract=0)
    if dropped is None:
        dx, d_dropped = _fused(triton_backend.backward_lora, codec)(dy, du, a.astype(dy.dtype), packed), None
    else:
        dx = api.fused(triton_backend.backward, codec)(dy, packed)
        d_dropped = dense_matmul(du, a.astype(dy.dtype), contract=0)
    return dx, d_dropped, _over_rows(du, adapted, a.dtype), _over_rows(dy, u, b.dtype), None, None


_matmul_lora.defvjp(_forward, _backward)


def _scaled(x: jax.Array, w: jax.Array, scale: jax.Array, contract: int) -> jax.Array:
    """scale * x w over w's dimension `contract`, rounded once, to x's dtype."""
    dims = (((x.ndim - 1,), (contract,)), ((), ()))
    return (jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32) * scale).astype(x.dtype)


def _over_rows(left: jax.Array, right: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """left [..., P], right [..., Q] -> [P, Q], summed over all rows in float32."""
    rows = tuple(range(left.ndim - 1))
    return jax.lax.dot_general(left, right, ((rows, rows), ((), ())), preferred_element_type=jnp.float32).astype(dtype)


def _fused(kernel: Callable, codec: Codec) -> Callable[[jax.Array, jax.Array, jax.Array, Packed], jax.Array]:
    """The kernel on x [..., K], u [..., R] and one adapter's matrix; every axis but the last is rows."""

    def product(x: jax.Array, u: jax.Array, matrix: jax.Array, packed: Packed) -> jax.Array:
        rows = math.prod(x.shape[:-1])
        y = of_pack(x.reshape(1, rows, x.shape[-1]), u.reshape(1, rows, u.shape[-1]), matrix[None], packed)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @jax.custom_batching.custom_vmap
    def of_pack(x: jax.Array, u: jax.Array, matrices: jax.Array, packed: Packed) -> jax.Array:
        """x [A, M, K], u [A, M, R], matrices [A, O, R] or [A, R, I]."""
        return kernel(x, u, matrices, packed, codec)

    @of_pack.def_vmap
    def fold(axis_size, batched, x, u, matrices, packed):
        if any(jax.tree.leaves(batched[3])):

            def one(k):  # weights that differ do not meet in one kernel
                arguments, vary = (x, u, matrices, packed), tuple(batched)
                return of_pack(*jax.tree.map(lambda leaf, varies: leaf[k] if varies else leaf, arguments, vary))

            return jax.lax.map(one, jnp.arange(axis_size)), True

        def with_axis(leaf, varies):
            return leaf if varies else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))

        x, u = with_axis(x, batched[0]), with_axis(u, batched[1])
        adapters, rows = x.shape[1:3]
        if not batched[2]:  # the same adapters: more rows of each
            x, u = (jnp.moveaxis(leaf, 0, 1).reshape(adapters, axis_size * rows, leaf.shape[3]) for leaf in (x, u))
            y = of_pack(x, u, matrices, packed)
            return jnp.moveaxis(y.reshape(adapters, axis_size, rows, y.shape[2]), 0, 1), True
        x, u, matrices = (leaf.reshape(axis_size * adapters, *leaf.shape[2:]) for leaf in (x, u, matrices))
        y = of_pack(x, u, matrices, packed)
        return y.reshape(axis_size, adapters, *y.shape[1:]), True

    return product
