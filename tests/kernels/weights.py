"""Packed weights, and what they mean, in numpy: nothing is compiled for them, and the reference is no kernel's."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.nf4_matmul import Codec, Packed
from qlora_jax.quant.codebooks import absmax_map, codebook


def whole_numbers(shape: tuple[int, int], block_size: int, nested: bool, seed: int) -> tuple[Packed, Codec]:
    """A weight that shows a wrong index: small whole numbers under a random table, whose products are exact in 16 bits
    and sums in float32."""
    rng = np.random.default_rng(seed)
    values, scales = shape[0] * shape[1], shape[0] * shape[1] // block_size
    table = tuple(float(value) for value in rng.permutation(np.arange(-8, 8)))
    map_ = tuple(float(value) for value in rng.choice([0.25, 0.5, 0.75], size=256))
    codes = jnp.asarray(rng.integers(0, 256, values // 2), jnp.uint8)
    codec = Codec(shape, block_size, table, map_)
    if not nested:
        return Packed(codes, jnp.asarray(rng.choice([0.5, 1.0, 2.0], size=scales), jnp.float32), None, None), codec
    absmax = jnp.asarray(rng.integers(0, 256, scales), jnp.uint8)
    nested_absmax = jnp.asarray(rng.choice([1.0, 2.0, 4.0], size=-(-scales // 256)), jnp.float32)
    return Packed(codes, absmax, nested_absmax, jnp.float32(0.5)), codec


def random_weight(
    shape: tuple[int, int], block_size: int = 64, format: str = "nf4", double_quant: bool = True, seed: int = 0
) -> tuple[Packed, Codec]:
    """Random codes and scales, of 0.8 to 4.2, in any shape: an odd number of values, a short last block."""
    rng = np.random.default_rng(seed)
    n = shape[0] * shape[1]
    scales = -(-n // block_size)
    codec = Codec(shape, block_size, codebook(format).values, absmax_map())
    codes = jnp.asarray(rng.integers(0, 256, -(-n // 2)), jnp.uint8)
    if not double_quant:
        return Packed(codes, jnp.asarray(rng.uniform(0.8, 4.2, scales), jnp.float32), None, None), codec
    absmax = jnp.asarray(rng.integers(0, 256, scales), jnp.uint8)
    nested_absmax = jnp.asarray(rng.uniform(0.8, 1.7, -(-scales // 256)), jnp.float32)
    return Packed(codes, absmax, nested_absmax, jnp.float32(2.5)), codec


def dequantized(packed: Packed, codec: Codec, dtype: Any = np.float32) -> np.ndarray:
    """W [O, I] by the words of reference.py: float32 products, rounded once to dtype; -0 is +0."""
    codes, absmax = np.asarray(packed.codes), np.asarray(packed.absmax)
    if packed.nested_absmax is not None:
        nested = np.asarray(packed.nested_absmax)[np.arange(len(absmax)) // 256]
        absmax = np.asarray(codec.absmax_map, np.float32)[absmax] * nested + np.asarray(packed.offset)
    number = np.arange(codec.shape[0] * codec.shape[1])
    table = np.asarray(codec.table, np.float32)
    values = table[np.concatenate([codes & 15, codes >> 4])[number]] * absmax[number // codec.block_size]
    assert values.dtype == np.float32
    values = values.astype(jnp.dtype(dtype))
    return np.where(values == 0, np.zeros_like(values), values).reshape(codec.shape)
