"""Embedding and head that train whole: their gradients, and what stays frozen beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import lora
from qlora_jax.errors import InputError
from qlora_jax.io.load import QuantSpec, load_model
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.layers import Trained
from qlora_jax.models.vocabulary import grow
from qlora_jax.train.step import make_gradient
from tests.random_arrays import random_normal

pytestmark = pytest.mark.quick_compile

FAST = {"xla_backend_optimization_level": 0}  # compiles in half the time
BOTH = ("embed_tokens", "lm_head")
G, B, T = 2, 2, 11


def parts(golden, checkpoint, modules, remat="block", dtype=jnp.float32):
    """graph, adapter, base of an adapter whose B is not zero."""
    model = load_model(golden / "llama" / checkpoint, QuantSpec("none"), dtype, remat)
    config = LoRAConfig(rank=2, dropout=0.0, targets=("v_proj",), modules_to_save=modules)
    for place, name in enumerate(lora.attach(model, config, jax.random.key(0))):
        layer = lora.linear(model, name)
        layer.lora_b.set_value(0.1 * random_normal(place, layer.lora_b.get_value().shape))
    return lora.split(model)


def batch():
    rng = np.random.default_rng(0)
    return rng.integers(3, 40, (G, B, T)).astype(np.int32), rng.random((G, B, T)) < 0.7


@pytest.mark.parametrize("checkpoint", ["llama1", "llama3"])
def test_gradients_are_those_of_the_whole_loss(golden, checkpoint):
    """remat "none" is differentiated by JAX; llama3 is tied: both uses of its one array add up. 7 divides no chunk."""
    found = []
    for remat in ("none", "block"):
        graph, adapter, base = parts(golden, checkpoint, BOTH, remat)
        gradient = jax.jit(make_gradient(graph, loss_chunk=7, max_grad_norm=0.3), compiler_options=FAST)
        found.append(gradient(adapter, base, *batch(), None))
    (expected, whole), (sums, metrics) = found
    assert jax.tree.structure(sums) == jax.tree.structure(expected) == jax.tree.structure(adapter)
    np.testing.assert_allclose(metrics.loss, whole.loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, whole.grad_norm, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(sums), jax.tree.leaves(expected), strict=True):
        assert float(jnp.abs(y).max()) > 0
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * float(jnp.abs(y).max()))
    matrices = lora.whole_matrices(sums)
    assert list(matrices) == (["embed_tokens"] if checkpoint == "llama3" else list(BOTH))
    if checkpoint == "llama1":  # only rows of tokens that came have a gradient, and each of those has
        rows = np.flatnonzero(np.abs(np.asarray(matrices["embed_tokens"])).sum(1))
        assert set(rows) <= set(batch()[0].ravel().tolist()) and len(rows) > 20


def test_what_is_frozen_and_what_trains(golden):
    for checkpoint, modules, names in (("llama1", BOTH, BOTH), ("llama3", BOTH, BOTH[:1]), ("llama1", (), ())):
        _, adapter, base = parts(golden, checkpoint, modules, dtype=jnp.bfloat16)
        matrices = lora.whole_matrices(adapter)
        assert tuple(matrices) == names and all(x.dtype == jnp.float32 for x in matrices.values())
        kept = {str(path[0]) for path, _ in jax.tree_util.tree_flatten_with_path(base)[0]}
        assert ("['embedding']" in kept) == (not names)
    plain = parts(golden, "llama1", ())
    assert "embedding" not in plain[1] and "head" not in plain[1]


def test_a_pack_of_adapters_with_matrices_is_each_for_itself(golden):
    graph, adapter, base = parts(golden, "llama1", BOTH)
    other = jax.tree.map(lambda leaf: leaf * 1.5, adapter)
    pack = jax.tree.map(lambda *leaves: jnp.stack(leaves), adapter, other)
    gradient = make_gradient(graph, loss_chunk=7, max_grad_norm=0.3)
    together, _ = jax.jit(jax.vmap(gradient, (0, None, None, None, None)), compiler_options=FAST)(
        pack, base, *batch(), None
    )
    alone = jax.jit(gradient, compiler_options=FAST)
    for place, one in enumerate((adapter, other)):
        sums, _ = alone(one, base, *batch(), None)
        for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(sums), strict=True):
            np.testing.assert_allclose(x[place], y, rtol=0, atol=1e-4 * float(jnp.abs(y).max()))


def test_new_rows_are_the_mean_of_the_real_ones(golden):
    """Row 90 and above were never a token's: a new token's row there is set too, others stay."""
    model = load_model(golden / "llama" / "llama1", compute_dtype=jnp.bfloat16)
    before = [np.asarray(matrix.get_value(), np.float32) for matrix in (model.embedding, model.head)]
    grow(model, 98, [90, 96, 97], 90)
    assert model.config.V == 98
    for matrix, old in zip((model.embedding, model.head), before, strict=True):
        found = np.asarray(matrix.get_value(), np.float32)
        assert found.shape == (98, 32)
        mean = np.asarray(jnp.asarray(old[:90].astype(np.float64).mean(0), jnp.bfloat16), np.float32)
        np.testing.assert_allclose(found[[90, 96, 97]], np.stack([mean] * 3), rtol=2**-7)
        np.testing.assert_array_equal(np.delete(found, [90, 96, 97], 0), np.delete(old, 90, 0))
    np.testing.assert_array_equal(found[96], found[90])


def test_a_matrix_that_trains_is_grown_without_rounding(golden):
    model = load_model(golden / "llama" / "llama3", compute_dtype=jnp.bfloat16)
    lora.train_whole(model, "lm_head")
    assert isinstance(model.embedding, Trained) and model.head is None
    old = np.asarray(model.embedding.get_value())
    V = len(old)
    grow(model, V + 1, [V], V)
    np.testing.assert_allclose(model.embedding.get_value()[V], old.astype(np.float64).mean(0), rtol=1e-5, atol=1e-7)


def test_names(golden):
    assert lora.select_modules(("auto",), True, False) == BOTH and lora.select_modules(("auto",), False, False) == ()
    assert lora.select_modules(("lm_head",), True, False) == ("lm_head",)
    assert lora.select_modules(("lm_head",), True, True) == BOTH and lora.select_modules((), True, True) == ()
    with pytest.raises(InputError, match="lora.modules_to_save has 'embed'; expected auto, or embed_tokens, lm_head"):
        lora.select_modules(("embed",), False, False)
    with pytest.raises(InputError, match="modules_to_save has 'score'"):
        LoRAConfig(modules_to_save=("score",))
