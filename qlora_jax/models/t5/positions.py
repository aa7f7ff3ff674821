"""The bias of attention scores by distance: one number for each head and bucket of distances, shared by all layers.

Half of the buckets are for a distance each, the others for ranges that grow by a constant factor up to max_distance.
Where both directions are seen (encoder), each has half of the buckets. Source: Raffel et al., 2020 (arXiv 1910.10683),
section 2.1; transformers' T5Attention for the rounding.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def bucket_of(distances: jax.Array, buckets: int, max_distance: int, both_ways: bool) -> jax.Array:
    """int32, of distances int32: a key's place less the query's. Where not `both_ways` later keys are as far as the
    query itself."""
    first: jax.Array | int = 0
    if both_ways:
        buckets //= 2
        first = jnp.where(distances > 0, buckets, 0)
        distances = jnp.abs(distances)
    else:
        distances = jnp.maximum(-distances, 0)
    exact = buckets // 2
    # in float32, in this order, as where the boundaries were learned
    growth = np.float32(math.log(max_distance / exact))
    grown = jnp.log(jnp.maximum(distances, 1).astype(jnp.float32) / exact) / growth * (buckets - exact)
    far = jnp.minimum(exact + grown.astype(jnp.int32), buckets - 1)
    return first + jnp.where(distances < exact, distances, far)


def bias_of(
    table: jax.Array, queries: jax.Array, keys: jax.Array, buckets: int, max_distance: int, both_ways: bool
) -> jax.Array:
    """float32 [B, N, T, S], to be added to scores.

    table: [buckets, N]. queries: int32 [B, T], keys: int32 [S], places of the tokens.
    """
    found = bucket_of(keys - queries[..., None], buckets, max_distance, both_ways)
    return jnp.moveaxis(table[found].astype(jnp.float32), -1, 1)
