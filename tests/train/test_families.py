"""Gradients of 4-bit models of other kinds than Llama: layer by layer and in chunks what reverse mode gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import lora
from qlora_jax.errors import InputError
from qlora_jax.io.load import QuantSpec, load_config, load_model
from qlora_jax.lora import LoRAConfig
from qlora_jax.train.shapes import ModelSpec, abstract_model
from qlora_jax.train.step import make_gradient
from tests.families import FAST, FOLDERS
from tests.random_arrays import random_normal

pytestmark = pytest.mark.quick_compile

QUANT = QuantSpec("nf4", 32, True)


def gradients(name: str, remat: str, sequence_chunk: int):
    """Of two examples packed into a row, and one beside them."""
    model = load_model(FOLDERS / name, QUANT, jnp.float32, remat, sequence_chunk=sequence_chunk)
    for place, target in enumerate(lora.attach(model, LoRAConfig(2, 4, 0.0), jax.random.key(1))):
        b = lora.linear(model, target).lora_b
        b.set_value(0.1 * random_normal(place, b.get_value().shape))
    graph, adapter, base = lora.split(model)
    tokens = np.random.default_rng(0).integers(3, 40, (1, 2, 23)).astype(np.int32)
    segments = np.ones((1, 2, 23), np.int32)
    segments[0, 0, 9:] = 2
    gradient = jax.jit(make_gradient(graph, 16, 0.0), compiler_options=FAST)
    return gradient(adapter, base, tokens, np.ones(tokens.shape, bool), None, segments)


def test_in_chunks_as_at_once():
    """Where layers differ in their windows, scores have soft caps and norms stand on both sides."""
    expected, metrics = gradients("gemma2_a", "none", 0)
    found, again = gradients("gemma2_a", "block", 8)
    np.testing.assert_allclose(again.loss, metrics.loss, rtol=1e-5)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(theirs).max() > 0
        np.testing.assert_allclose(mine, theirs, atol=2e-5 * np.abs(theirs).max(), rtol=1e-3)


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDERS.glob("*_a")))
def test_a_plan_knows_the_same_arrays(name):
    """abstract_model of a config.json has the shapes and dtypes of the model that its folder gives."""
    spec = ModelSpec(load_config(FOLDERS / name), QUANT, LoRAConfig(2), "float32", "bfloat16", kernel="xla")
    model = load_model(FOLDERS / name, QUANT, jnp.float32)
    lora.attach(model, spec.lora, jax.random.key(0))
    planned = abstract_model(spec)
    for a, b in zip((planned.graph, planned.adapter, planned.base), lora.split(model), strict=True):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(a)] == [(x.shape, x.dtype) for x in jax.tree.leaves(b)]


def test_cudnn_is_refused_where_it_would_leave_something_out():
    model = load_model(FOLDERS / "gemma2_a", QUANT, jnp.float32, attention="cudnn")
    with pytest.raises(InputError, match='model.attention is "cudnn", which JAX calls without windows'):
        jax.eval_shape(model, jax.ShapeDtypeStruct((1, 8), jnp.int32))


def test_experts_take_the_room_of_one():
    """Of eight times the experts a gradient's temporaries hold no more: codes are read in their stacks, one by one."""
    sizes = load_config(FOLDERS / "qwen3_moe_a")

    def temporaries(count: int) -> int:
        experts = dataclasses.replace(sizes.kind.experts, count=count, per_token=2)
        config = dataclasses.replace(sizes, D=128, F=256, kind=dataclasses.replace(sizes.kind, experts=experts))
        model = abstract_model(ModelSpec(config, QuantSpec(), LoRAConfig(2, dropout=0.0, targets=("q_proj",))))
        tokens, mask = (jax.ShapeDtypeStruct((1, 1, 32), dtype) for dtype in (jnp.int32, bool))
        gradient = jax.jit(make_gradient(model.graph, 16, 0.0), compiler_options=FAST)
        program = gradient.lower(model.adapter, model.base, tokens, mask, None)
        return program.compile().memory_analysis().temp_size_in_bytes

    codes_of_a_layer = 64 * 3 * 128 * 256 // 2
    assert temporaries(64) - temporaries(8) < 0.05 * codes_of_a_layer
