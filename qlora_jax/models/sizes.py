"""How much the frozen linear layers take in each format: from shapes alone, nothing is loaded."""

import math
from collections.abc import Callable

from qlora_jax.models.config import ModelConfig
from qlora_jax.quant import native
from qlora_jax.quant.tensor import check_format


def linear_weights(config: ModelConfig) -> int:
    """Weights of all linear layers, those of all experts among them."""
    return sum(map(config.weights, config.linears))


def active_share(config: ModelConfig, size: Callable[[str], float]) -> float:
    """The share of what linear layers have that one token meets, by the size of each: some experts of all."""
    experts = config.kind.experts
    return share_with(experts.per_token / experts.count if experts else 1.0, config, size)


def share_with(share: float, config: ModelConfig, size: Callable[[str], float]) -> float:
    """The share of what linear layers have, by the size of each, with such a share of the experts."""
    total = sum(map(size, config.linears))
    return sum(size(name) * (share if config.is_expert(name) else 1) for name in config.linears) / total


def linear_bytes(
    config: ModelConfig, format: str, block_size: int = 64, double_quant: bool = True
) -> tuple[int, float]:
    """(bytes, bits a weight) of all linear layers; format "none" is 16-bit."""
    total, weights = 0, 0
    for name, shape in config.linears.items():
        weights += config.weights(name)
        count = config.weights(name) // math.prod(shape)
        total += count * _bytes(shape, format, block_size, double_quant)
    return total, 8 * total / weights


def _bytes(shape: tuple[int, ...], format: str, block_size: int, double_quant: bool) -> int:
    if format == "none":
        return 2 * math.prod(shape)
    check_format(format)
    return native.abstract(shape, format, block_size, double_quant).nbytes
