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


def put(stack: Any, leaf: Any, index: int, layers: int) -> Any:
    """Writes one layer's arrays into their place; the stack is allocated once (None before) and updated in place."""
    if stack is None:
        stack = jax.tree.map(lambda x: jnp.zeros((layers, *x.shape), x.dtype), leaf)
    return jax.block_until_ready(_write_layer(stack, leaf, jnp.int32(index)))


@partial(jax.jit, donate_argnums=0)
def _write(buffer: jax.Array, piece: jax.Array, corner: tuple[Any, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, piece.astype(buffer.dtype), corner)


@partial(jax.jit, donate_argnums=0)
def _write_layer(stack: Any, leaf: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x, index, 0), stack, leaf)
