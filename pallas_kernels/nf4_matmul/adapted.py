"""Products of packed weights with adapters beside them: y_p = x W_p^T + scale_p * dropped_p A_p^T B_p^T.

In few products: the weights of one x are joined (api.matmul_joined), adapters of one shape multiplied in a batch, and B
stands beside W, where several adapters keep to rows and columns of their own:

    y = [x | low_rank] [W | B]^T        [d x | d low_rank] = d y [W | B]

That is for GPUs, where XLA dequantizes and multiplies. Packs, CPUs and kernels that decode take W and B apart.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.nf4_matmul import api, config
from pallas_kernels.nf4_matmul.dense import batched_matmul, dense_matmul
from pallas_kernels.nf4_matmul.operands import Codec, Packed

Matrices = tuple[jax.Array, ...]


def matmul_adapted(
    x: jax.Array,
    dropped: jax.Array,
    packed: tuple[Packed, ...],
    codecs: tuple[Codec, ...],
    a: Matrices,
    b: Matrices,
    scale: tuple[float | jax.Array, ...],
) -> jax.Array:
    """y_p of P weights, side by side.

    Args:
      x: [..., I]. packed, codecs: P weights [O_p, I].
      dropped: [P, ..., I], for each adapter what dropout leaves of x; [1, ..., I] is the same for all.
      a: P of [R, I]. b: P of [O_p, R], rounded to x's dtype, as is every product. scale: P numbers or arrays [].
    Returns:
      [..., sum of O_p] in x's dtype.
    """
    low_rank = low_rank_of(dropped, a, scale)
    b = tuple(each.astype(x.dtype) for each in b)
    return _adapted(x.reshape(-1, x.shape[-1]), low_rank, b, packed, codecs).reshape(*x.shape[:-1], -1)


def low_rank_terms(dropped: jax.Array, a: Matrices, b: Matrices, scale: tuple[float | jax.Array, ...]) -> jax.Array:
    """What the adapters add to y, side by side: [..., sum of O_p]; arguments as matmul_adapted's."""
    terms = _terms(low_rank_of(dropped, a, scale), tuple(each.astype(dropped.dtype) for each in b))
    return terms.reshape(*dropped.shape[1:-1], terms.shape[-1])


def low_rank_of(dropped: jax.Array, a: Matrices, scale: tuple[float | jax.Array, ...]) -> jax.Array:
    """scale_p * dropped_p A_p^T: [P, M, R], named "low_rank": small, and worth keeping for the backward pass."""
    P, dtype = len(a), dropped.dtype
    rows = dropped.reshape(len(dropped), -1, dropped.shape[-1])
    if P == 1 and api.is_for_cpu():
        low_rank = dense_matmul(rows[0], a[0].astype(dtype), contract=1)[None]
    elif len(rows) == P:
        low_rank = batched_matmul(rows, jnp.stack([each.astype(dtype) for each in a]))
    else:
        low_rank = dense_matmul(rows[0], jnp.concatenate([each.astype(dtype) for each in a]), contract=1)
        low_rank = jnp.moveaxis(low_rank.reshape(len(low_rank), P, -1), 1, 0)
    scales = jnp.stack([jnp.asarray(each, dtype) for each in scale])
    return checkpoint_name(low_rank * scales[:, None, None], "low_rank")


def _terms(low_rank: jax.Array, b: Matrices) -> jax.Array:
    """low_rank [P, M, R], B_p [O_p, R] -> [M, sum of O_p]."""
    if len(b) == 1 and api.is_for_cpu():
        return dense_matmul(low_rank[0], b[0], contract=1)
    if _is_alike(b):
        return jnp.moveaxis(batched_matmul(low_rank, jnp.stack(b)), 0, 1).reshape(low_rank.shape[1], -1)
    parts = [dense_matmul(x, each, contract=1) for x, each in zip(low_rank, b, strict=True)]
    return jnp.concatenate(parts, axis=-1)


def _is_alike(matrices: Matrices) -> bool:
    return len({each.shape for each in matrices}) == 1


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _adapted(
    x: jax.Array, low_rank: jax.Array, b: Matrices, packed: tuple[Packed, ...], codecs: tuple[Codec, ...]
) -> jax.Array:
    """x [M, I], low_rank [P, M, R], B_p [O_p, R] -> [M, sum of O_p]."""
    return _in_one("forward", codecs)(x, low_rank, b, packed)


def _forward(x, low_rank, b, packed, codecs):
    return _adapted(x, low_rank, b, packed, codecs), (low_rank, b, packed)


def _backward(codecs, residuals, dy):
    low_rank, b, packed = residuals
    _, to_b = jax.vjp(lambda b: _terms(low_rank, b), b)
    dx, d_low_rank = _in_one("backward", codecs)(dy, low_rank, b, packed)
    return dx, d_low_rank, *to_b(dy), None


_adapted.defvjp(_forward, _backward)


def _in_one(op: config.Op, codecs: tuple[Codec, ...]) -> Callable[..., Any]:
    """(x or d y, low_rank, b, packed) -> y, or (d x, d low_rank): by one product where that is XLA's on a GPU."""
    apart, together = _WAYS[op]
    apart, together = partial(apart, codecs=codecs), partial(together, codecs=codecs)

    @jax.custom_batching.custom_vmap
    def product(rows: jax.Array, low_rank: jax.Array, b: Matrices, packed: tuple[Packed, ...]) -> Any:
        if not _pays(op, codecs) or not api.is_dense(op, rows, codecs):
            return apart(rows, low_rank, b, packed)
        return jax.lax.platform_dependent(rows, low_rank, b, packed, cpu=apart, default=together)

    @product.def_vmap
    def of_a_pack(axis_size, batched, *arguments):
        """Members share W and have B's of their own, which cannot stand beside it."""
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(batched))
        out = jax.vmap(apart, in_axes=axes, axis_size=axis_size)(*arguments)
        return out, jax.tree.map(lambda _: True, out)

    return product


def _pays(op: config.Op, codecs: tuple[Codec, ...]) -> bool:
    """Forward x is copied, to stand beside low_rank; what the copy spares is as wide as y."""
    return op == "backward" or sum(codec.shape[0] for codec in codecs) > codecs[0].shape[1]


def _forward_apart(x, low_rank, b, packed, codecs):
    return api.matmul_joined(x, packed, codecs) + _terms(low_rank, b)


def _forward_together(x, low_rank, b, packed, codecs):
    x = jnp.concatenate([x, jnp.moveaxis(low_rank, 0, 1).reshape(len(x), -1)], axis=1)
    return api.dense_product("forward", x, packed, codecs, beside=_columns(b))


def _backward_apart(dy, low_rank, b, packed, codecs):
    _, to_low_rank = jax.vjp(lambda low_rank: _terms(low_rank, b), low_rank)
    return api.backward(dy, packed, codecs), *to_low_rank(dy)


def _backward_together(dy, low_rank, b, packed, codecs):
    I = codecs[0].shape[1]  # noqa: E741
    out = api.dense_product("backward", dy, packed, codecs, beside=_columns(b))
    return out[:, :I], jnp.moveaxis(out[:, I:].reshape(len(dy), len(b), -1), 1, 0)


_WAYS = {"forward": (_forward_apart, _forward_together), "backward": (_backward_apart, _backward_together)}


def _columns(b: Matrices) -> list[jax.Array]:
    """What stands beside each W_p: its B_p [O_p, R] in columns of its own, [O_p, P * R]."""
    P, R = len(b), b[0].shape[1]
    return [jnp.pad(each, ((0, 0), (p * R, (P - 1 - p) * R))) for p, each in enumerate(b)]
