"""Layers that every decoder shares: a linear layer over a frozen weight, RMSNorm, rotary embedding, attention.

A block's arrays are stacked: inside `lax.scan` each layer sees its own slice, so a Linear here is for one layer.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.nf4_matmul import dense_matmul, low_rank_term
from qlora_jax.models.dropout import Dropout
from qlora_jax.quant.tensor import QuantizedTensor, matmul


class Frozen(nnx.Variable):
    """A weight that never trains: a QuantizedTensor, or an array for what stays in 16 or 32 bits."""


class Trained(nnx.LoRAParam):
    """A whole matrix that trains beside the adapters, in float32: it goes wherever they go."""


class Linear(nnx.Module):
    """y = x W^T, plus scale * dropout(x) A^T B^T where an adapter is attached.

    weight: W [O, I], QuantizedTensor or array. lora_a: A [R, I], lora_b: B [O, R], float32.
    """

    def __init__(self, weight: QuantizedTensor | jax.Array):
        self.weight = Frozen(weight)
        self.lora_a: Any = nnx.data(None)
        self.lora_b: Any = nnx.data(None)
        self.lora_scale: Any = 1.0  # a number, or an array [] of the program's input

    def __call__(self, x: jax.Array, dropout: Dropout) -> jax.Array:
        w = self.weight.get_value()
        # x's gradient is summed in the order of these products: another order rounds otherwise
        y = matmul(x, w) if isinstance(w, QuantizedTensor) else dense_matmul(x, w.astype(x.dtype), contract=1)
        if self.lora_a is None:
            dropout.skip()
            return y
        a, b = self.lora_a.get_value(), self.lora_b.get_value()
        return y + low_rank_term(dropout(x), a, b, self.lora_scale)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight, in float32; the result has x's dtype."""

    def __init__(self, weight: jax.Array, eps: float):
        self.weight = Frozen(weight)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * self.weight.get_value()).astype(x.dtype)


def rope_inverse_frequencies(H: int, theta: float, scaling: dict) -> jax.Array:
    """float32 [H / 2], angle a position; scaling is {} or transformers' rope parameters of type linear or llama3."""
    inverse = 1.0 / theta ** (jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    if scaling.get("rope_type") == "linear":
        return inverse / scaling["factor"]
    if scaling.get("rope_type") == "llama3":
        return _llama3_frequencies(inverse, scaling)
    return inverse


def _llama3_frequencies(inverse: jax.Array, scaling: dict) -> jax.Array:
    """Llama 3.1: long wavelengths slowed by `factor`, short ones kept, a linear blend between."""
    context = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / inverse
    blend = jnp.clip((context / wavelength - low) / (high - low), 0, 1)
    return (1 - blend) * inverse / scaling["factor"] + blend * inverse


def rotate(x: jax.Array, positions: jax.Array, inverse_frequencies: jax.Array) -> jax.Array:
    """Rotary embedding of x [B, T, N, H] at positions int32 [B, T]; pairs are (h, h + H / 2), as in HF's files."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def in_order(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x, y), where what comes of this x waits for y; so do their gradients for each other.

    Projections of one input need not be computed side by side: where weights are dequantized before they are
    multiplied, a GPU's compiler would hold several of them in 16 bits at once.
    """
    return jax.lax.optimization_barrier((x, y))


@jax.custom_vjp
def gradient_after(y: jax.Array, x: jax.Array) -> jax.Array:
    """y, whose gradient waits for x: in a layer that is computed again, the last weight waits for the first ones."""
    return y


def _gradient_after_forward(y, x):
    return y, x


def _gradient_after_backward(x, dy):
    dy, x = jax.lax.optimization_barrier((dy, x))
    return dy, jnp.zeros_like(x)


gradient_after.defvjp(_gradient_after_forward, _gradient_after_backward)
