"""However a batch is cut into micro-batches: the same dropout masks, and loss and gradient within rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax import lora
from qlora_jax.io.load import QuantSpec, load_model
from qlora_jax.lora import LoRAConfig
from qlora_jax.train.step import make_gradient
from tests.random_arrays import random_normal

pytestmark = pytest.mark.quick_compile

FAST = {"xla_backend_optimization_level": 0}  # compiles in half the time
ROWS, T = 8, 24


@pytest.fixture(scope="module")
def parts(golden):
    """A model with one trained projection (it compiles fast) and much dropout: graph, adapter, base."""
    model = load_model(golden / "llama" / "llama1", QuantSpec("none"), jnp.float32)
    lora.attach(model, LoRAConfig(rank=2, targets=("v_proj",), dropout=0.5), jax.random.key(0))
    layer = lora.linear(model, "self_attn.v_proj")
    layer.lora_b.set_value(0.3 * random_normal(1, layer.lora_b.get_value().shape))
    return lora.split(model)


def with_settings(parts, **settings):
    model = nnx.merge(*parts)
    for name, value in settings.items():
        setattr(model, name, value)
    return lora.split(model)


def batch():
    """Rows of unlike numbers of targets, each of three examples."""
    rng = np.random.default_rng(0)
    mask = rng.random((ROWS, T)) < np.linspace(0.1, 0.9, ROWS)[:, None]
    segments = np.sort(rng.integers(1, 4, (ROWS, T)), axis=1).astype(np.int32)
    return rng.integers(3, 96, (ROWS, T)).astype(np.int32), mask, segments


def cut(arrays, G):
    return [array.reshape(G, ROWS // G, T) for array in arrays]


def step(parts, G, key=3, packed=True, **settings):
    """The clipped mean gradient, its metrics, and the products that the program has."""
    graph, adapter, base = with_settings(parts, **settings)
    tokens, mask, segments = cut(batch(), G)
    arguments = (adapter, base, tokens, mask, jax.random.key(key), segments if packed else None)
    gradient = jax.jit(make_gradient(graph, 64, 0.3), compiler_options=FAST).lower(*arguments).compile()
    sums, metrics = gradient(*arguments)
    gradients = [np.asarray(g * metrics.factor) for g in jax.tree.leaves(sums)]
    return gradients, metrics, gradient.as_text().count(" dot(")


def assert_same(found, expected):
    for a, b in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0)
    assert float(found[1].loss) == pytest.approx(float(expected[1].loss), rel=1e-6)
    assert float(found[1].grad_norm) == pytest.approx(float(expected[1].grad_norm), rel=1e-5)


def test_every_cut_gives_the_same_step_whatever_is_kept(parts):
    """Packed rows. "selective" spares the products of six linear layers, of the adapter's A and B, of p and v."""
    expected = step(parts, 8)
    for G in (4, 2, 1):
        assert_same(found := step(parts, G), expected)
    kept = step(parts, 1, remat="selective")
    for a, b in zip(kept[0], found[0], strict=True):
        np.testing.assert_array_equal(a, b)
    assert found[2] - kept[2] == 6 + 2 + 1


def test_every_cut_gives_the_same_step_in_chunks(parts):
    expected = step(parts, 4, packed=False, sequence_chunk=10)
    assert_same(step(parts, 1, packed=False, sequence_chunk=10), expected)
    other = step(parts, 1, key=4, packed=False, sequence_chunk=10)  # the masks matter
    assert abs(float(other[1].loss) - float(expected[1].loss)) > 1e-4 * float(expected[1].loss)
