"""Weights that show a wrong index: every product and sum with whole numbers is exact."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.nf4_matmul import Codec, Packed


def whole_numbers(shape: tuple[int, int], block_size: int, nested: bool, seed: int) -> tuple[Packed, Codec]:
    """A weight of small whole numbers under a random table: its products are exact in 16 bits, sums in float32."""
    rng = np.random.default_rng(seed)
    values, scales = shape[0] * shape[1], shape[0] * shape[1] // block_size
    table = tuple(float(value) for value in rng.permutation(np.arange(-8, 8)))
    absmax_map = tuple(float(value) for value in rng.choice([0.25, 0.5, 0.75], size=256))
    codes = jnp.asarray(rng.integers(0, 256, values // 2), jnp.uint8)
    codec = Codec(shape, block_size, table, absmax_map)
    if not nested:
        return Packed(codes, jnp.asarray(rng.choice([0.5, 1.0, 2.0], size=scales), jnp.float32), None, None), codec
    absmax = jnp.asarray(rng.integers(0, 256, scales), jnp.uint8)
    nested_absmax = jnp.asarray(rng.choice([1.0, 2.0, 4.0], size=-(-scales // 256)), jnp.float32)
    return Packed(codes, absmax, nested_absmax, jnp.float32(0.5)), codec
