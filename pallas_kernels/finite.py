"""Largest magnitudes that no NaN slips through.

What a max, min, clip, sort or comparison makes of a NaN is the backend's choice: XLA's vectorized max on CPUs drops it.
So nothing here compares floats that may be NaN; bit patterns are compared as integers.
"""

from typing import Any

import jax
import jax.numpy as jnp

_MAGNITUDE, _INFINITY = 0x7FFFFFFF, 0x7F800000  # of float32: all bits but the sign; every NaN's are above infinity's


def largest_magnitude(x: jax.Array, axis: int | None = None) -> jax.Array:
    """max |x| along an axis (over all of x by default), float32: finite exactly where all of the values are.

    A NaN counts as infinity: the integers that its bits are, are brought down to infinity's before anything is compared
    as a float.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & _MAGNITUDE
    return jnp.max(jax.lax.bitcast_convert_type(jnp.minimum(bits, _INFINITY), jnp.float32), axis=axis)


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """bool []: whether every value of every float array of the tree is finite; True for a tree without any."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size]
    # along the last axis first: reductions to a single number are slow on CPUs
    each = [jnp.max(largest_magnitude(jnp.atleast_1d(leaf), axis=-1)) < jnp.inf for leaf in floats]
    return jnp.all(jnp.asarray(each, bool))
