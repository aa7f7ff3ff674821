"""Onto the device, piece by piece: the host holds a few pieces of a tensor, the device the tensor and one piece.

Of several devices each holds its part of a tensor, where the caller says how it is divided.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.io.folder import TensorFiles


def anywhere(name: str, leaf: Any) -> None:
    """Where an array of a model stands: on the device."""


def to_device(files: TensorFiles, key: str, dtype: Any = None, sharding: Any = None) -> jax.Array:
    """A tensor in its own shape, in dtype (its own by default), rounded on the device where they differ.

    `sharding`: how several devices hold it; None is one.
    """
    shape, dtype = files.shapes[key], jnp.dtype(dtype or files.dtypes[key])
    pieces = files.pieces(key)
    buffer: Any = None
    for corner, piece in pieces:
        if piece.shape == shape:
            return jax.block_until_ready(jax.device_put(jnp.asarray(piece).astype(dtype), sharding))
        if buffer is None:
            buffer = jnp.zeros(shape, dtype, device=sharding)
        buffer = jax.block_until_ready(_write(buffer, jnp.asarray(piece), corner))
        del piece
    return buffer


def put(
    stack: Any,
    leaf: Any,
    place: tuple[int, ...],
    room: tuple[int, ...],
    sharding: Callable[[str, Any], Any] = anywhere,
) -> Any:
    """Writes one weight's arrays into their place in a stack, (layer,) or (layer, expert), of `room` (L,) or (L, E).

    The stack is allocated once (None before) and updated in place. `sharding`: takes the name of a part of the weight
    (".codes", or "" of an array) and its stack's shape, and says how devices hold it.
    """
    if stack is None:

        def empty(path: Any, x: Any) -> jax.Array:
            shape = jax.ShapeDtypeStruct((*room, *x.shape), x.dtype)
            return jnp.zeros(shape.shape, shape.dtype, device=sharding(jax.tree_util.keystr(path), shape))

        stack = jax.tree_util.tree_map_with_path(empty, leaf)
    return jax.block_until_ready(_write_weight(stack, leaf, tuple(map(jnp.int32, place))))


@partial(jax.jit, donate_argnums=0)
def _write(buffer: jax.Array, piece: jax.Array, corner: tuple[Any, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, piece.astype(buffer.dtype), corner)


@partial(jax.jit, donate_argnums=0)
def _write_weight(stack: Any, leaf: Any, place: tuple[jax.Array, ...]) -> Any:
    def write(stack: jax.Array, x: jax.Array) -> jax.Array:
        one = x.reshape(*(1,) * len(place), *x.shape)
        return jax.lax.dynamic_update_slice(stack, one, (*place, *(0,) * x.ndim))

    return jax.tree.map(write, stack, leaf)
