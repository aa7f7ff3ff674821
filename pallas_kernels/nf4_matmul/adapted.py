"""Products of packed weights with adapters beside them: y_p = x W_p^T + scale_p * dropped_p A_p^T B_p^T.

In few products: the weights of one x are joined (api.matmul_joined), adapters of one shape multiplied in a batch. Backward, d x
and what goes to the A's take the same d y, so that B_p stands beside W_p in one product, [d x | d low_rank] = d y [W | B],
where several adapters keep to rows and columns of their own.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.nf4_matmul import api
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
    if len(rows) == P:
        low_rank = batched_matmul(rows, jnp.stack([each.astype(dtype) for each in a]))
    else:
        low_rank = dense_matmul(rows[0], jnp.concatenate([each.astype(dtype) for each in a]), contract=1)
        low_rank = jnp.moveaxis(low_rank.reshape(len(low_rank), P, -1), 1, 0)
    scales = jnp.stack([jnp.asarray(each, dtype) for each in scale])
    return checkpoint_name(low_rank * scales[:, None, None], "low_rank")


def _terms(low_rank: jax.Array, b: Matrices) -> jax.Array:
    """low_rank [P, M, R], B_p [O_p, R] -> [M, sum of O_p]."""
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
    return api.matmul_joined(x, packed, codecs) + _terms(low_rank, b)


def _forward(x, low_rank, b, packed, codecs):
    return _adapted(x, low_rank, b, packed, codecs), (low_rank, b, packed)


def _backward(codecs, residuals, dy):
    low_rank, b, packed = residuals
    _, to_b = jax.vjp(lambda b: _terms(low_rank, b), b)
    dx, d_low_rank = _pulled(codecs)(dy, b, packed)
    return dx, d_low_rank, *to_b(dy), None


_adapted.defvjp(_forward, _backward)


def _pulled(codecs: tuple[Codec, ...]):
    """(d y [M, sum of O_p], b, packed) -> (d x [M, I], d low_rank [P, M, R])."""

    @jax.custom_batching.custom_vmap
    def pull(dy: jax.Array, b: Matrices, packed: tuple[Packed, ...]) -> tuple[jax.Array, jax.Array]:
        if not api.is_dense("backward", dy, codecs):
            return _apart(dy, b, packed, codecs)
        both = partial(_together, codecs=codecs)
        return jax.lax.platform_dependent(dy, b, packed, cpu=partial(_apart, codecs=codecs), default=both)

    @pull.def_vmap
    def over_members(axis_size, batched, dy, b, packed):
        """A pack's members share W and have B's of their own, which cannot stand beside it."""
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(batched))
        out = jax.vmap(partial(_apart, codecs=codecs), in_axes=axes, axis_size=axis_size)(dy, b, packed)
        return out, (True, True)

    return pull


def _apart(dy, b, packed, codecs):
    _, to_low_rank = jax.vjp(lambda low_rank: _terms(low_rank, b), jnp.zeros((len(b), len(dy), b[0].shape[1]), dy.dtype))
    return api.backward(dy, packed, codecs), *to_low_rank(dy)


def _together(dy, b, packed, codecs):
    P, R, I = len(b), b[0].shape[1], codecs[0].shape[1]  # noqa: E741
    columns = [jnp.pad(each, ((0, 0), (p * R, (P - 1 - p) * R))) for p, each in enumerate(b)]
    out = api.dense_product("backward", dy, packed, codecs, beside=columns)
    return out[:, :I], jnp.moveaxis(out[:, I:].reshape(-1, P, R), 1, 0)
