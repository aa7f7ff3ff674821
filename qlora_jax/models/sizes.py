"""How much the frozen linear layers take in each format: from shapes alone, nothing is loaded."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qlora_jax.models.config import ModelConfig
from qlora_jax.quant.tensor import quantize


def linear_weights(config: ModelConfig) -> int:
    """Weights of all linear layers."""
    return config.L * sum(map(math.prod, config.linears.values()))


def linear_bytes(
    config: ModelConfig, format: str, block_size: int = 64, double_quant: bool = True
) -> tuple[int, float]:
    """(bytes, bits a weight) of all linear layers; format "none" is 16-bit."""
    total, weights = 0, 0
    for shape in config.linears.values():
        weights += config.L * math.prod(shape)
        total += config.L * _bytes(shape, format, block_size, double_quant)
    return total, 8 * total / weights


def _bytes(shape: tuple[int, ...], format: str, block_size: int, double_quant: bool) -> int:
    w = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    stored: Callable = lambda w: w if format == "none" else quantize(w, format, block_size, double_quant)  # noqa: E731
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(stored, w)))
