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


SETTINGS = {
    "layer by layer, packed": ({"remat": "block"}, True, (8, 4, 2, 1)),
    "in chunks": ({"remat": "block", "sequence_chunk": 10}, False, (4, 1)),
    "differentiated whole": ({"remat": "none"}, False, (8, 2)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_cut_gives_the_same_step(parts, name):
    settings, packed, cuts = SETTINGS[name]
    graph, adapter, base = with_settings(parts, **settings)
    arrays = batch()
    gradient = jax.jit(make_gradient(graph, 64, 0.3), compiler_options=FAST)

    def step(G, key):
        tokens, mask, segments = cut(arrays, G)
        sums, metrics = gradient(adapter, base, tokens, mask, key, segments if packed else None)
        return jax.tree.map(lambda g: np.asarray(g * metrics.factor), sums), metrics

    expected, metrics = step(cuts[0], jax.random.key(3))
    for G in cuts[1:]:
        found, other = step(G, jax.random.key(3))
        assert float(other.loss) == pytest.approx(float(metrics.loss), rel=1e-6)
        assert float(other.grad_norm) == pytest.approx(float(metrics.grad_norm), rel=1e-5)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0)
    # the masks matter: with others the loss is another one
    _, others = step(cuts[0], jax.random.key(4))
    assert abs(float(others.loss) - float(metrics.loss)) > 1e-4 * float(metrics.loss)
