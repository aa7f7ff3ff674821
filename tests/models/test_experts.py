"""Experts: values and gradients against all experts computed for all tokens, and what stands in memory for them."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax import lora
from qlora_jax.io.load import QuantSpec, load_config, load_model
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.dropout import Dropout
from qlora_jax.models.layers import part_of
from qlora_jax.models.mixtures.experts import Stack, _Tiles, mixture, tile_rows
from qlora_jax.quant.tensor import QuantizedTensor, dequantize
from qlora_jax.train.shapes import ModelSpec, abstract_model
from qlora_jax.train.step import make_gradient
from tests.families import FAST, FOLDERS
from tests.models.equations import equations
from tests.random_arrays import random_normal

pytestmark = pytest.mark.quick_compile
QUANT = QuantSpec("nf4", 32, True)
ROLES = ("gate", "up", "down")


@cache
def parts(quant=QUANT):
    """Graph and state of a model of 2 layers and 6 experts, with adapters on all of it, B not zero."""
    model = load_model(FOLDERS / "qwen3_moe_a", quant, jnp.float32)
    for place, name in enumerate(lora.attach(model, LoRAConfig(2, 4, 0.0), jax.random.key(1))):
        b = lora.linear(model, name).lora_b
        b.set_value(0.3 * random_normal(place, b.get_value().shape))
    return lora.split(model)


def sparse(graph, adapter, base, x, chosen, weights, layer=1, dropout=None):
    """`mixture` of one layer."""
    model = nnx.merge(graph, adapter, base)
    block, *state = model.layers(nnx.LoRAParam, ...)
    state = jax.tree.map(lambda leaf: leaf[layer], state)
    block = nnx.merge(block, *state, nnx.state(model.blocks, Stack))
    return mixture(block, model.config.kind, x, chosen, weights, jnp.int32(layer), dropout or Dropout(0.0, None))


def dense(graph, adapter, base, x, chosen, weights, layer=1):
    """Every expert for every token, by einsums."""
    model = nnx.merge(graph, adapter, base)
    kind, rows = model.config.kind, x.reshape(-1, x.shape[-1])
    table = {}
    for role in ROLES:
        linear = part_of(model.blocks, kind.linear[role])
        w = linear.weight.get_value()
        if isinstance(w, QuantizedTensor):
            w = jax.vmap(lambda q: dequantize(q, jnp.float32))(jax.tree.map(lambda leaf: leaf[layer], w))
        else:
            w = w[layer]
        a, b = linear.lora_a.get_value()[layer], linear.lora_b.get_value()[layer]
        table[role] = w + linear.lora_scale * jnp.einsum("eor,eri->eoi", b, a)
    exact = lambda equation, *arrays: jnp.einsum(equation, *arrays, precision="highest")  # noqa: E731
    gate, up = (exact("mi,eoi->emo", rows, table[role]) for role in ("gate", "up"))
    out = exact("emi,eoi->emo", jax.nn.silu(gate) * up, table["down"])
    shares = jnp.zeros((len(rows), len(out))).at[jnp.arange(len(rows))[:, None], chosen].set(weights)
    return exact("me,emo->mo", shares, out).reshape(x.shape)


def routed(seed: int, tokens: int, count: int, k: int, only=None):
    rng = np.random.default_rng(seed)
    order = [rng.permutation(count if only is None else only)[:k] for _ in range(tokens)]
    return np.asarray(order, np.int32), rng.random((tokens, k)).astype(np.float32)


@pytest.mark.parametrize(
    ("quant", "tokens", "k", "only"),
    [(QUANT, 37, 3, None), (QUANT, 1, 2, None), (QUANT, 40, 1, 1), (QuantSpec("none"), 24, 6, None)],
)
def test_as_all_experts_for_all_tokens(quant, tokens, k, only):
    """Experts without tokens, one expert for all tokens (many tiles), all experts, one token."""
    graph, adapter, base = parts(quant)
    x = random_normal(0, (1, tokens, 16)).reshape(1, tokens, 16)
    chosen, weights = routed(1, tokens, 6, k, only)
    dy = random_normal(2, x.shape)

    def both(function):
        def run(adapter, x, weights):
            y = function(graph, adapter, base, x, chosen, weights)
            return jnp.vdot(y, dy), y

        gradients, values = jax.jit(jax.grad(run, (0, 1, 2), has_aux=True), compiler_options=FAST)(adapter, x, weights)
        return values, gradients

    (found, ours), (expected, theirs) = both(sparse), both(dense)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    for mine, their in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, their, atol=3e-5 * max(np.abs(their).max(), 1e-6))


def test_no_expert_in_16_bits_is_kept():
    """What a gradient keeps of a layer of experts: codes, scales, adapters, activations; no weight."""
    graph, adapter, base = parts()
    chosen, weights = routed(1, 8, 6, 3)
    loss = lambda adapter, x: jnp.sum(sparse(graph, adapter, base, x, chosen, weights))  # noqa: E731
    _, pull = jax.eval_shape(lambda *inputs: jax.vjp(loss, *inputs), adapter, random_normal(0, (1, 8, 16)))
    kept = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(pull)]
    weight = 12 * 16
    assert any(dtype == jnp.uint8 and shape == (2, 6, weight // 2) for shape, dtype in kept)
    of_adapters = {leaf.shape for leaf in jax.tree.leaves(adapter)} | {
        leaf.shape[1:] for leaf in jax.tree.leaves(adapter)
    }
    large = [shape for shape, dtype in kept if dtype != jnp.uint8 and np.prod(shape) >= weight]
    assert not {*large} - of_adapters


def test_neither_experts_nor_depth_add_a_program():
    """A gradient has as many equations for twice the experts and layers; one expert's weights are decoded at a time."""
    sizes = load_config(FOLDERS / "qwen3_moe_a")
    tokens = jax.ShapeDtypeStruct((1, 1, 24), jnp.int32)

    def program(layers: int, count: int):
        kind = dataclasses.replace(sizes.kind, experts=dataclasses.replace(sizes.kind.experts, count=count))
        config = dataclasses.replace(sizes, L=layers, kind=kind)
        model = abstract_model(ModelSpec(config, QUANT, LoRAConfig(2, 4, 0.1), "float32", "float32"))
        gradient = make_gradient(model.graph, 16, 0.0)
        mask = jax.ShapeDtypeStruct(tokens.shape, bool)
        return jax.make_jaxpr(gradient)(model.adapter, model.base, tokens, mask, jax.random.key(0)).jaxpr

    few = program(2, 6)
    assert equations(few) == equations(program(5, 12)) > 1000
    few = str(few)
    assert "f32[12,16]" in few and "f32[6,12,16]" not in few and "f32[2,6,12,16]" not in few


def test_tiles():
    assert tile_rows(2048, 8, 128) == 128 and tile_rows(1, 8, 128) == 1 and tile_rows(16, 8, 128) == 8
    assert tile_rows(2048, 2, 8) == 512 and tile_rows(24, 3, 6) == 16


def test_pairs_of_other_devices_experts_are_in_no_tile():
    """Three experts are here, whose numbers are 0 to 2; 3 stands for all others."""
    chosen = np.random.default_rng(0).integers(0, 12, (40, 2)).clip(max=3)

    def cut(chosen):
        tiles = _Tiles.of(chosen, 3, 8)
        return tiles.number, jax.vmap(tiles.tile)(jnp.arange(6))

    cut = jax.jit(cut, compiler_options=FAST)
    number, found = jax.tree.map(np.asarray, cut(chosen.astype(np.int32)))
    assert number == sum(-(-np.sum(chosen == expert) // 8) for expert in range(3)) < 6
    rows = zip(found.expert[:number], found.pairs[:number], strict=True)
    pairs = {(expert, pair) for expert, row in rows for pair in row}
    wanted = {(expert, pair) for pair, expert in enumerate(chosen.reshape(-1)) if expert < 3}
    assert {(expert, pair) for expert, pair in pairs if pair < chosen.size} == wanted
    assert cut(np.full((40, 2), 3, np.int32))[0] == 0


def test_dropout_of_a_token_depends_on_no_other():
    """Another token in the batch, or another place in the tiles, changes nobody's mask; experts' masks differ."""
    graph, adapter, base = parts()
    x = random_normal(0, (1, 12, 16))
    key = jax.random.key(3)
    run = jax.jit(
        lambda x, chosen, weights: sparse(graph, adapter, base, x, chosen, weights, dropout=Dropout(0.5, key)),
        compiler_options=FAST,
    )
    chosen, weights = routed(1, 12, 6, 3)
    first = run(x, chosen, weights)
    elsewhere = np.where(np.arange(12)[:, None] == 4, chosen, (chosen + 1) % 6)
    np.testing.assert_allclose(run(x, elsewhere, weights)[0, 4], first[0, 4], rtol=1e-5)
    plain = jax.jit(lambda x: sparse(graph, adapter, base, x, jnp.asarray(chosen), jnp.asarray(weights)))(x)
    assert np.abs(first - plain).max() > 1e-3
