"""Parts of an array from all devices that have one: as they are, or rounded before they travel.

Both are for the inside of `shard_map`. Their gradients are summed over the devices in the array's own dtype, and each
device gets those of its part.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Along = str | tuple[str, ...]  # axes of a mesh


def from_all(x: jax.Array, along: Along, axis: int) -> jax.Array:
    """x's parts, one after the other along one of its axes."""
    return jax.lax.all_gather(x, along, axis=axis, tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def rounded_from_all(x: jax.Array, along: Along, axis: int, dtype: Any) -> jax.Array:
    """`from_all` of float32 x for a reader that rounds to `dtype`, in which it travels: float32 with such values.

    Differentiated as it stands it would sum gradients in `dtype`, too.
    """
    return from_all(x.astype(dtype), along, axis).astype(x.dtype)


rounded_from_all.defvjp(
    lambda x, along, axis, dtype: (rounded_from_all(x, along, axis, dtype), None),
    lambda along, axis, dtype, _, dy: (jax.lax.psum_scatter(dy, along, scatter_dimension=axis, tiled=True),),
)


def rows_here(table: jax.Array, rows: jax.Array, along: Along) -> jax.Array:
    """Those of int32 rows [...] that this device has of a table [V, ...] divided along its first axis, else zeros."""
    here = rows - jax.lax.axis_index(along) * table.shape[0]
    is_here = (here >= 0) & (here < table.shape[0])
    return jnp.where(is_here.reshape(*here.shape, *(1,) * (table.ndim - 1)), table.at[here].get(mode="clip"), 0)
