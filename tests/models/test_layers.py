"""A linear layer with an adapter is its formula, to the last bit: results of earlier runs can be made again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.nf4_matmul import dense_matmul
from qlora_jax.models.dropout import Dropout
from qlora_jax.models.layers import Linear
from qlora_jax.quant.tensor import matmul, quantize
from tests.random_arrays import random_normal

SCALE = 0.75


def normal(*shape: int, seed: int) -> jax.Array:
    return random_normal(seed, shape)


def formula(x, weight, a, b, dropout):
    y = dense_matmul(x, weight.astype(x.dtype), contract=1) if isinstance(weight, jax.Array) else matmul(x, weight)
    low_rank = dense_matmul(dropout(x), a.astype(x.dtype), contract=1)
    return y + dense_matmul(low_rank, b.astype(x.dtype), contract=1) * jnp.asarray(SCALE, x.dtype)


def layer(x, weight, a, b, dropout):
    linear = Linear(weight)
    linear.lora_a, linear.lora_b, linear.lora_scale = nnx.LoRAParam(a), nnx.LoRAParam(b), SCALE
    return linear(x, dropout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantized", [False, True])
def test_values_and_gradients_are_the_formulas(quantized, dtype):
    """Three layers of one x: its gradient is a sum of six, and products in another order round otherwise."""
    weights = [normal(48, 64, seed=k) for k in range(3)]
    weights = [quantize(w) for w in weights] if quantized else weights
    x = normal(7, 64, seed=3).astype(dtype)
    adapters = [(normal(8, 64, seed=4 + k), normal(48, 8, seed=7 + k)) for k in range(3)]

    def gradient(product):
        def loss(x, adapters):
            dropout = Dropout(0.3, jax.random.key(0))
            outputs = [product(x, w, *ab, dropout) for w, ab in zip(weights, adapters, strict=True)]
            return sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in outputs), outputs

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, adapters)

    found, expected = gradient(layer), gradient(formula)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
