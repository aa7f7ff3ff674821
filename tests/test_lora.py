"""Adapters: which layers, how they start, what dropout does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax import lora
from qlora_jax.errors import InputError
from qlora_jax.io.load import QuantSpec, load_model
from qlora_jax.lora import LoRAConfig, select_targets
from qlora_jax.models.dropout import Dropout
from qlora_jax.models.known import known_config
from qlora_jax.models.layers import Linear
from tests.llama_names import LINEARS

pytestmark = pytest.mark.quick_compile

TWELVE_LAYERS = dataclasses.replace(known_config("huggyllama/llama-7b"), L=12)

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]


@pytest.fixture
def model(golden):
    return load_model(golden / "llama" / "llama1", QuantSpec(), jnp.float32)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["all-linear"], list(LINEARS)),
        (["q_proj"], ["self_attn.q_proj"]),
        (["v_proj", "q_proj", "q_proj"], ["self_attn.q_proj", "self_attn.v_proj"]),
        (["mlp.up_proj"], ["mlp.up_proj"]),
        ([r"model\.layers\.\d+\.self_attn\..*"], ATTENTION),
        ([r".*\.(up|down)_proj", "o_proj"], ["self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]),
        (["all-linear", "q_proj"], list(LINEARS)),
    ],
)
def test_targets(targets, expected):
    assert select_targets(targets, TWELVE_LAYERS) == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "lora.targets is empty"),
        (["q_prj"], "'q_prj' matches no linear layer; known: q_proj, k_proj"),
        (["all-linear", "lm_head"], "'lm_head' matches no linear layer"),
        (["proj"], "'proj' matches no linear layer"),
        (["self_attn"], "'self_attn' matches no linear layer"),
        (["["], r"'\[' is no regular expression"),
        ([r"model\.layers\.[0-3]\.mlp\.up_proj"], r"picks mlp.up_proj in 4 of 12 layers"),
        ([r"model\.layers\.0\..*"], "picks self_attn.q_proj in 1 of 12, .*mlp.down_proj in 1 of 12 layers"),
    ],
)
def test_targets_refused(targets, message):
    with pytest.raises(InputError, match=message):
        select_targets(targets, TWELVE_LAYERS)


@pytest.mark.parametrize("field", [{"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}, {"alpha": 0.0}, {"alpha": np.nan}])
def test_nonsense_settings(field):
    with pytest.raises(InputError, match=f"lora.{next(iter(field))} is"):
        LoRAConfig(**field)


def test_scale():
    assert LoRAConfig(rank=64, alpha=16).scale == 0.25
    assert LoRAConfig(rank=4, alpha=3, use_rslora=True).scale == 1.5


def test_fresh_adapter_is_the_base_bit_for_bit(model):
    tokens = jnp.asarray([[1, 5, 9, 33, 2, 70]])
    logits = jax.jit(lambda m: m.logits(m(tokens)[0]))
    base = logits(model)
    lora.attach(model, LoRAConfig(rank=4), jax.random.key(0))
    np.testing.assert_array_equal(logits(model).view(np.uint32), base.view(np.uint32))


def test_initialisation_is_pefts(model):
    """A uniform within 1 / sqrt(I), B zero, no two alike; only what is asked for."""
    names = lora.attach(model, LoRAConfig(rank=16, targets=("q_proj", "down_proj")), jax.random.key(0))
    assert names == ["self_attn.q_proj", "mlp.down_proj"]
    _, adapter, base = lora.split(model)
    arrays = lora.adapter_arrays(adapter)
    assert list(sorted(arrays)) == sorted(names)
    for name, (a, b) in arrays.items():
        O, I = lora.shape(model, name)
        assert a.shape == (2, 16, I) and b.shape == (2, O, 16) and a.dtype == b.dtype == jnp.float32
        assert not np.asarray(b).any()
        bound = 1 / np.sqrt(I)
        values = np.asarray(a).reshape(-1)
        assert np.abs(values).max() <= bound and np.abs(values).max() > 0.98 * bound
        assert abs(values.mean()) < 0.05 * bound and values.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
    q, down = arrays["self_attn.q_proj"][0], arrays["mlp.down_proj"][0]
    assert not np.allclose(q[0], q[1]) and not np.allclose(q[0] / q.max(), down[0, :, : q.shape[2]] / down.max())
    assert not any(
        jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.shape[1:] == q.shape[1:] for leaf in jax.tree.leaves(base)
    )


def test_only_the_adapter_is_in_the_adapter(model):
    lora.attach(model, LoRAConfig(rank=2), jax.random.key(0))
    graph, adapter, base = lora.split(model)
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter)) == sum(
        2 * 2 * sum(lora.shape(model, name)) for name in LINEARS
    )
    assert all("lora" not in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(base))
    lora.split(model)  # the model is still whole


def test_linear_with_adapter_is_its_formula():
    rng = np.random.default_rng(0)
    w, a, b, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 10), (3, 10), (6, 3), (2, 4, 10)))
    layer = Linear(jnp.asarray(w))
    layer.lora_a, layer.lora_b, layer.lora_scale = nnx.LoRAParam(jnp.asarray(a)), nnx.LoRAParam(jnp.asarray(b)), 0.5
    expected = x @ w.T + 0.5 * (x @ a.T @ b.T)
    np.testing.assert_allclose(layer(jnp.asarray(x), Dropout(0.0, None)), expected, atol=1e-5)


def test_dropout():
    x = jnp.full((400, 500), 3.0, jnp.bfloat16)
    key = jax.random.key(7)
    once = np.asarray(Dropout(0.1, key)(x), np.float32)
    np.testing.assert_array_equal(once, np.asarray(Dropout(0.1, key)(x), np.float32))
    kept = once != 0
    np.testing.assert_allclose(once[kept], 3 / 0.9, rtol=0.01)
    assert 1 - kept.mean() == pytest.approx(0.1, abs=0.003)  # 4.5 standard deviations
    assert once.mean() == pytest.approx(3.0, abs=0.02)
    # each linear layer of a block, each layer and each step draws its own
    dropout = Dropout(0.1, key)
    first, second = dropout(x), dropout(x)
    assert (np.asarray(first) != np.asarray(second)).any()
    assert (np.asarray(Dropout(0.1, jax.random.key(8))(x)) != np.asarray(first)).any()


@pytest.mark.parametrize(("rate", "key"), [(0.0, jax.random.key(0)), (0.9, None)])
def test_no_dropout_is_the_input_itself(rate, key):
    x = jnp.arange(6.0)
    assert Dropout(rate, key)(x) is x


def test_dropout_changes_the_adapter_alone(model):
    """With the adapter at work dropout moves the output; the base's part stays exact."""
    lora.attach(model, LoRAConfig(rank=2, alpha=4, dropout=0.5, targets=("down_proj",)), jax.random.key(0))
    layer = lora.linear(model, "mlp.down_proj")
    layer.lora_b.set_value(jnp.ones_like(layer.lora_b.get_value()))
    tokens = jnp.asarray([[1, 5, 9, 33]])
    hidden = jax.jit(lambda m, key: m(tokens, dropout_key=key)[0])
    plain, a, again, b = (hidden(model, key) for key in (None, jax.random.key(1), jax.random.key(1), jax.random.key(2)))
    np.testing.assert_array_equal(a, again)
    assert np.abs(a - b).max() > 1e-3 and np.abs(a - plain).max() > 1e-3
