"""Onto the device, piece by piece: the host holds a few pieces of a tensor, the device the tensor and one piece."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.io.folder import TensorFiles


def to_device(files: TensorFiles, key: str, dtype: Any = None) -> jax.Array:
    """A tensor in its own shape, in dtype (its own by default), rounded on the device where they differ."""
    shape, dtype = files.shapes[key], jnp.dtype(dtype or files.dtypes[key])
    pieces = files.pieces(key)
    buffer: Any = None
    for corner, piece in pieces:
        if piece.shape == shape:
            return jax.block_until_ready(jnp.asarray(piece).astype(dtype))
        if buffer is None:
            buffer = jnp.zeros(shape, dtype)
        buffer = jax.block_until_ready(_write(buffer, jnp.asarray(piece), corner))
        del piece
    return buffer


def put(stack: Any, leaf: Any, place: tuple[int, ...], room: tuple[int, ...]) -> Any:
    """Writes one weight's arrays into their place in a stack, (layer,) or (layer, expert), of `room` (L,) or (L, E).

    The stack is allocated once (None before) and updated in place.
    """
    if stack is None:
        stack = _empty(leaf, room)
    return jax.block_until_ready(_write_weight(stack, leaf, tuple(map(jnp.int32, place))))


@partial(jax.jit, static_argnames="room")
def _empty(leaf: Any, room: tuple[int, ...]) -> Any:
    """Zeros for a stack of leaves, its arrays in one program."""
    return jax.tree.map(lambda x: jnp.zeros((*room, *x.shape), x.dtype), leaf)


@partial(jax.jit, donate_argnums=0)
def _write(buffer: jax.Array, piece: jax.Array, corner: tuple[Any, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, piece.astype(buffer.dtype), corner)


@partial(jax.jit, donate_argnums=0)
def _write_weight(stack: Any, leaf: Any, place: tuple[jax.Array, ...]) -> Any:
    def write(stack: jax.Array, x: jax.Array) -> jax.Array:
        one = x.reshape(*(1,) * len(place), *x.shape)
        return jax.lax.dynamic_update_slice(stack, one, (*place, *(0,) * x.ndim))

    return jax.tree.map(write, stack, leaf)
