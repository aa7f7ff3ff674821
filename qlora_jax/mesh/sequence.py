"""Rows whose tokens are several devices': inside `shard_map` alone.

Device s of S has the tokens [s T / S, (s + 1) T / S) of each row. What is of one token alone needs no other device.
Attention does: queries stay, keys and values of all T tokens come to each device, in the dtype in which they are
multiplied; their gradients go back summed, in that dtype, too. Tokens, masks and segments are a few kilobytes: each
device is given those of whole rows, so that none is asked for what its neighbour's first token is, or where an example
began. Source: Dubey et al., 2024 (Llama 3, arXiv 2407.21783), section 3.3.2, but for the order of the tokens: theirs
gives each device an early and a late part, and as much to do as the others.
"""

import jax
import jax.numpy as jnp

from qlora_jax.mesh.axes import SEQUENCE
from qlora_jax.mesh.gather import from_all


def first_of(T: int) -> jax.Array:
    """Which of a row's T tokens this device's begin with, int32 []. T is a multiple of the devices."""
    return jax.lax.axis_index(SEQUENCE) * (T // jax.lax.axis_size(SEQUENCE))


def own(x: jax.Array) -> jax.Array:
    """x [B, T, ...] of whole rows -> [B, T / S, ...] of this device's tokens."""
    T = x.shape[1]
    return jax.lax.dynamic_slice_in_dim(x, first_of(T), T // jax.lax.axis_size(SEQUENCE), axis=1)


def own_and_next(x: jax.Array) -> jax.Array:
    """x [B, T] -> [B, T / S + 1]: that of the token after them, too; zero (False) behind the row's last."""
    T = x.shape[1]
    followed = jnp.pad(x, ((0, 0), (0, 1)))
    return jax.lax.dynamic_slice_in_dim(followed, first_of(T), T // jax.lax.axis_size(SEQUENCE) + 1, axis=1)


def of_all(keys_values: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B, T / S, K, H] each of this device's tokens -> [B, T, K, H] of all."""
    k, v = keys_values
    return from_all(k, SEQUENCE, 1), from_all(v, SEQUENCE, 1)


def at_places(x: jax.Array, places: jax.Array) -> jax.Array:
    """x [B, T / S, D] of this device's tokens, of which those at places int32 [B] of whole rows -> [B, D]."""
    mine = places - jax.lax.axis_index(SEQUENCE) * x.shape[1]
    is_here = (mine >= 0) & (mine < x.shape[1])
    found = x[jnp.arange(x.shape[0]), jnp.clip(mine, 0, x.shape[1] - 1)]
    return jax.lax.psum(jnp.where(is_here[:, None], found, 0), SEQUENCE)
