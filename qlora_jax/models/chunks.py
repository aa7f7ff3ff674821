"""A long sequence in chunks: what no other position needs exists for one chunk at a time, forward and backward.

    k, v = keys_values(x)        for each chunk; kept whole, for all queries see them
    y_c  = rest(x_c, k, v)       for each chunk c: queries, attention, projections, feed-forward

Backward: each chunk's `rest` is computed again and pulled back, d k and d v are summed over chunks in float32, then
each chunk's `keys_values`. y is written over x, and d x over d y. A weight is dequantized once for each chunk and pass.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def chunk_size(T: int, chunk: int) -> int:
    """Tokens of each of the fewest chunks of at most `chunk` that hold T: as equal as they come, for little padding."""
    count = -(-T // chunk)
    return -(-T // count)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_chunks(function: Callable, size: int, frozen: Any, shared: Any, x: jax.Array) -> jax.Array:
    """y [B, T, ...] of x's shape and dtype, from y_c = function(frozen, shared, x_c, first) for each chunk of x.

    Args:
      function: pure and hashable; x_c is [B, size, ...], first int32 []: the position of its first token.
      size: tokens of a chunk; T is a multiple.
      frozen: arrays without a gradient. shared: float arrays; their gradient is summed over chunks in float32.
      x: [B, T, ...].
    """
    return _over_chunks(lambda y, first: function(frozen, shared, _cut(y, first, size), first), size, x)


def _in_chunks_forward(function, size, frozen, shared, x):
    return in_chunks(function, size, frozen, shared, x), (frozen, shared, x)


def _in_chunks_backward(function, size, saved, dy):
    frozen, shared, x = saved
    d_shared, dx = _pull_back(lambda s, x, first: function(frozen, s, x, first), size, shared, x, dy)
    return None, _like(d_shared, shared), dx


in_chunks.defvjp(_in_chunks_forward, _in_chunks_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def layer_in_chunks(
    keys_values: Callable, share: Callable, rest: Callable, size: int, frozen: Any, adapter: Any, x: jax.Array
) -> jax.Array:
    """A decoder layer: x [B, T, D] -> [B, T, D].

    Args:
      keys_values: (frozen, adapter, x_c, first) -> (k_c, v_c), [B, size, K, H] each; pure and hashable, as is `rest`.
      share: (k, v) -> what `rest` takes, of all devices that have a part of each row.
      rest: (frozen, adapter, (k, v), x_c, first) -> y_c [B, size, D].
      size: tokens of a chunk; T is a multiple.
      frozen: arrays without a gradient. adapter: float32 arrays.
    """
    return _layer_forward(keys_values, share, rest, size, frozen, adapter, x)[0]


def not_shared(keys_values: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """For layer_in_chunks, where a device has whole rows."""
    return keys_values


def _layer_forward(keys_values, share, rest, size, frozen, adapter, x):
    project = lambda first: keys_values(frozen, adapter, _cut(x, first, size), first)  # noqa: E731
    B, T = x.shape[:2]
    room = [jnp.zeros((B, T, *like.shape[2:]), like.dtype) for like in jax.eval_shape(project, jnp.int32(0))]
    kv = share(_over_chunks(lambda _, first: project(first), size, tuple(room)))
    y = _over_chunks(lambda y, first: rest(frozen, adapter, kv, _cut(y, first, size), first), size, x)
    return y, (frozen, adapter, x, kv)


def _layer_backward(keys_values, share, rest, size, saved, dy):
    frozen, adapter, x, kv = saved

    def of_rest(shared, x, first):
        return rest(frozen, shared[0], shared[1], x, first)

    (d_adapter, d_kv), dx = _pull_back(of_rest, size, (adapter, kv), x, dy)
    own = tuple(jax.ShapeDtypeStruct((*x.shape[:2], *leaf.shape[2:]), leaf.dtype) for leaf in kv)
    [d_kv] = jax.linear_transpose(share, own)(_like(d_kv, kv))

    def add_keys_values(carry, number):
        (d_adapter, dx), first = carry, number * size
        project = lambda adapter, x: keys_values(frozen, adapter, x, first)  # noqa: E731
        _, pull = jax.vjp(project, adapter, _cut(x, first, size))
        fresh, dx_c = pull(_cut(d_kv, first, size))
        return (_sum(d_adapter, fresh), _write(dx, _cut(dx, first, size) + dx_c, first)), None

    (d_adapter, dx), _ = jax.lax.scan(add_keys_values, (d_adapter, dx), jnp.arange(x.shape[1] // size))
    return None, _like(d_adapter, adapter), dx


layer_in_chunks.defvjp(_layer_forward, _layer_backward)


def _over_chunks(chunk_of: Callable, size: int, out: Any) -> Any:
    """`out` with chunk_of(out, first) written at each chunk."""

    def step(out, number):
        first = number * size
        return _write(out, chunk_of(out, first), first), None

    return jax.lax.scan(step, out, jnp.arange(jax.tree.leaves(out)[0].shape[1] // size))[0]


def _pull_back(function: Callable, size: int, shared: Any, x: jax.Array, dy: jax.Array) -> tuple[Any, jax.Array]:
    """float32 gradient of `shared`, and d x written over d y, of y_c = function(shared, x_c, first)."""

    def step(carry, number):
        (d_shared, dx), first = carry, number * size
        _, pull = jax.vjp(lambda shared, x: function(shared, x, first), shared, _cut(x, first, size))
        fresh, dx_c = pull(_cut(dx, first, size))
        return (_sum(d_shared, fresh), _write(dx, dx_c, first)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shared)
    return jax.lax.scan(step, (zeros, dy), jnp.arange(x.shape[1] // size))[0]


def _cut(tree: Any, first: jax.Array, size: int) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, size, axis=1), tree)


def _write(tree: Any, chunk: Any, first: jax.Array) -> Any:
    return jax.tree.map(lambda leaf, c: jax.lax.dynamic_update_slice_in_dim(leaf, c, first, axis=1), tree, chunk)


def _sum(total: Any, fresh: Any) -> Any:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, fresh)


def _like(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda leaf, other: leaf.astype(other.dtype), tree, like)
