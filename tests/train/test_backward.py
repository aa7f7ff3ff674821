"""Gradients layer by layer: where the layers' inputs wait, and sequences cut into chunks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import lora
from qlora_jax.io.load import QuantSpec, load_model
from qlora_jax.lora import LoRAConfig
from qlora_jax.models import decoder
from qlora_jax.models.dropout import Dropout
from qlora_jax.train.backward import kept_bytes
from qlora_jax.train.step import make_evaluation, make_gradient
from tests.llama_names import LINEARS
from tests.random_arrays import random_normal

pytestmark = pytest.mark.quick_compile

FAST = {"xla_backend_optimization_level": 0}  # compiles in half the time
G, B, T = 2, 2, 37


def parts(golden, remat="block", sequence_chunk=0, dropout=0.2, dtype=jnp.float32, quant="none", names=LINEARS):
    """Grouped-query attention, an adapter with B not zero on these layers: graph, adapter, base."""
    model = load_model(golden / "llama" / "llama2", QuantSpec(quant), dtype, remat, sequence_chunk=sequence_chunk)
    lora.attach(model, LoRAConfig(rank=2, dropout=dropout, targets=tuple(names)), jax.random.key(0))
    for place, name in enumerate(names):
        layer = lora.linear(model, name)
        shape = layer.lora_b.get_value().shape
        layer.lora_b.set_value(0.1 * random_normal(place, shape))
    return lora.split(model)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(3, 96, (G, B, T)).astype(np.int32), rng.random((G, B, T)) < 0.7


def step(graph):
    return make_gradient(graph, loss_chunk=13, max_grad_norm=0.3)


def rank_of(tensor: str) -> int:
    return tensor.count("x")


def close(a, b, share: float) -> bool:
    """Every array within `share` of its own largest value."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.abs(x - y).max() <= share * np.abs(y).max() for x, y in pairs)


@pytest.mark.parametrize("sequence_chunk", [0, 16])
@pytest.mark.parametrize(("remat", "moves"), [("block", 0), ("block+offload", 2)])
def test_for_cuda_the_inputs_go_to_host_memory_and_back(golden, sequence_chunk, remat, moves):
    """XLA:CPU has one memory; that a run keeps its numbers there is tested in test_loop.py."""
    graph, adapter, base = parts(golden, remat, sequence_chunk, dtype=jnp.bfloat16, quant="nf4")
    traced = jax.jit(step(graph)).trace(adapter, base, *batch(), jax.random.key(5))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("annotate_device_placement") == moves


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_16_bit_step_multiplies_16_bit_operands(golden, quant):
    """A float32 cotangent that meets a weight makes XLA:GPU write the weight in 32 bits: 1 GB for a 65B's head."""
    graph, adapter, base = parts(golden, dtype=jnp.bfloat16, quant=quant)
    traced = jax.jit(step(graph)).trace(adapter, base, *batch(), jax.random.key(5))
    lowered = traced.lower(lowering_platforms=("cuda",))
    operands = re.findall(r"dot_general .*: \((tensor<\S+>), (tensor<\S+>)\) ->", lowered.as_text())
    rows_and_weights = [pair for pair in operands if max(map(rank_of, pair)) <= 3]  # the others are attention's
    assert len(rows_and_weights) > 50
    assert all(a.endswith("xbf16>") and b.endswith("xbf16>") for a, b in rows_and_weights)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU: CPUs have one memory")
def test_offloaded_inputs_come_back_in_order_on_a_gpu(golden):
    """XLA of jax 0.11.0 read them from first to last on GPUs and said nothing (openxla/xla#46231)."""
    results = []
    for remat in ("block", "block+offload"):
        graph, adapter, base = parts(golden, remat)
        results.append(jax.jit(step(graph))(adapter, base, *batch(), None))
    assert close(*results, 1e-5)


def test_a_pack_of_adapters_is_each_for_itself(golden):
    """In chunks too. Whole sequences: tests/packs."""
    few = [name for name in LINEARS if name.endswith(("k_proj", "down_proj"))]  # compile in two thirds of the time
    graph, adapter, base = parts(golden, "block+offload", sequence_chunk=16, names=few)
    other = jax.tree.map(lambda leaf: leaf * 1.5, adapter)
    pack = jax.tree.map(lambda *leaves: jnp.stack(leaves), adapter, other)
    keys = jax.random.split(jax.random.key(1), 2)
    gradient = step(graph)
    together, metrics = jax.jit(jax.vmap(gradient, (0, None, None, None, 0)), compiler_options=FAST)(
        pack, base, *batch(), keys
    )
    alone = jax.jit(gradient, compiler_options=FAST)
    for place, one in enumerate((adapter, other)):
        sums, own = alone(one, base, *batch(), keys[place])
        assert float(metrics.loss[place]) == pytest.approx(float(own.loss), rel=1e-5)
        assert close(jax.tree.map(lambda leaf, place=place: leaf[place], together), sums, 1e-4)


def test_chunks_of_the_sequence_give_the_gradient_of_the_whole(golden):
    """No dropout: it is drawn for each chunk. 37 tokens: no chunk but 1 divides them, 36 leaves one token alone."""
    results = []
    for size in (0, 1, 36):
        graph, adapter, base = parts(golden, "block", size, dropout=0.0)
        results.append(jax.jit(step(graph), compiler_options=FAST)(adapter, base, *batch(), None))
    (expected, metrics), *others = results
    for found, chunked in others:
        assert float(chunked.loss) == pytest.approx(float(metrics.loss), rel=1e-5)
        assert close(found, expected, 1e-4)


def test_evaluation_in_chunks_is_evaluation(golden):
    tokens, mask = (x[0] for x in batch())
    losses = []
    for chunk in (0, 16):
        graph, adapter, base = parts(golden, sequence_chunk=chunk)
        losses.append(jax.jit(make_evaluation(graph, 64), compiler_options=FAST)(adapter, base, tokens, mask))
    assert float(losses[0][0]) == pytest.approx(float(losses[1][0]), rel=1e-5) != 0


def test_layer_by_layer_is_the_derivative_of_the_whole(golden):
    """remat "none" is differentiated by JAX: also through chunks and their dropout, whose masks must come again."""
    results = []
    for remat in ("none", "block"):
        graph, adapter, base = parts(golden, remat, sequence_chunk=16)
        results.append(jax.jit(step(graph), compiler_options=FAST)(adapter, base, *batch(), jax.random.key(2)))
    (expected, metrics), (found, chunked) = results
    assert float(chunked.loss) == pytest.approx(float(metrics.loss), rel=1e-5)
    assert close(found, expected, 1e-4)


def test_each_chunk_draws_its_own_dropout(golden, monkeypatch):
    """Seed, layer, function of a chunk, its first token: no two draw the same bits, and a seed draws them again."""
    keys = []

    class Watched(Dropout):
        def __init__(self, rate, key):
            super().__init__(rate, key)
            drawn = jax.random.key_data(key.key), key.first_token
            jax.debug.callback(lambda data, first: keys.append((*data.tolist(), int(first))), *drawn)

    monkeypatch.setattr(decoder, "Dropout", Watched)
    model = load_model(golden / "llama" / "llama2", compute_dtype=jnp.float32, sequence_chunk=16)
    tokens = jnp.asarray(batch()[0][0])
    for seed in (0, 1, 0):
        jax.block_until_ready(model(tokens, dropout_key=jax.random.key(seed))[0])
    jax.effects_barrier()
    one_pass = model.config.L * 3 * 2
    assert len(keys) == 3 * one_pass and len(set(keys)) == 2 * one_pass


def test_bytes_of_the_block_inputs(golden):
    model = load_model(golden / "llama" / "llama2")
    assert kept_bytes(model.config, "block", B=3, T=40, itemsize=2) == model.config.L * 3 * 40 * model.config.D * 2
