"""A linear layer with an adapter is its formula, in float32 to the last bit; several are each for itself."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.nf4_matmul import dense_matmul
from qlora_jax.models.dropout import Dropout
from qlora_jax.models.layers import Linear, project
from qlora_jax.quant.tensor import matmul, quantize
from tests.random_arrays import random_normal

pytestmark = pytest.mark.quick_compile

SCALE = 0.75


def normal(*shape: int, seed: int) -> jax.Array:
    return random_normal(seed, shape)


def formula(x, weight, a, b, dropout):
    low_rank = dense_matmul(dropout(x), a.astype(x.dtype), contract=1) * jnp.asarray(SCALE, x.dtype)
    y = dense_matmul(x, weight.astype(x.dtype), contract=1) if isinstance(weight, jax.Array) else matmul(x, weight)
    return y + dense_matmul(low_rank, b.astype(x.dtype), contract=1)


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
    if dtype == "float32":
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    else:  # what is fused is not rounded between
        as_float = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)  # noqa: E731
        close = partial(np.testing.assert_allclose, rtol=0.05, atol=0.5)
        jax.tree.map(close, as_float(found), as_float(expected))


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("heights", [(48, 48, 48), (48, 16, 16), (32,)])
def test_linear_layers_of_one_input_are_each_for_itself(heights, rate, monkeypatch):
    """Joined in few products, as for a GPU: values, and gradients of x, of each A and of each B."""
    monkeypatch.setattr("qlora_jax.models.layers.is_for_cpu", lambda: False)
    linears = []
    for k, O in enumerate(heights):  # noqa: E741
        linear = Linear(quantize(normal(O, 64, seed=k)), normal(O, seed=20 + k))
        linear.lora_a, linear.lora_b = nnx.LoRAParam(normal(8, 64, seed=4 + k)), nnx.LoRAParam(normal(O, 8, seed=7 + k))
        linear.lora_scale = SCALE + k
        linears.append(linear)
    parts = [nnx.split(linear, nnx.LoRAParam, ...) for linear in linears]
    x = normal(2, 5, 64, seed=3)

    def gradient(make):
        def loss(x, adapters):
            merged = [nnx.merge(graph, mine, rest) for (graph, _, rest), mine in zip(parts, adapters, strict=True)]
            outputs = make(merged, x, Dropout(rate, jax.random.key(0)))
            return sum(jnp.sum(jnp.sin(y)) for y in outputs), outputs

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, [adapter for _, adapter, _ in parts])

    found = gradient(project)
    expected = gradient(lambda linears, x, dropout: [linear(x, dropout) for linear in linears])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), found, expected)


def test_layers_of_which_some_have_no_adapter_or_no_packed_weight_are_each_for_itself():
    plain, packed = Linear(normal(16, 64, seed=0)), Linear(quantize(normal(16, 64, seed=1)))
    adapted = Linear(quantize(normal(16, 64, seed=2)))
    adapted.lora_a, adapted.lora_b = nnx.LoRAParam(normal(8, 64, seed=3)), nnx.LoRAParam(normal(16, 8, seed=4))
    x, mask = normal(5, 64, seed=5), lambda: Dropout(0.3, jax.random.key(1))
    for linears in ([plain, packed], [packed, adapted], [plain, adapted, packed], [packed, packed]):
        dropout = mask()
        expected = [linear(x, dropout) for linear in linears]
        for y, other in zip(project(linears, x, mask()), expected, strict=True):
            np.testing.assert_allclose(y, other, rtol=1e-5, atol=1e-5)
