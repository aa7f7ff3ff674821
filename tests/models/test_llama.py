"""The decoder against transformers' logits, and what must hold of any decoder."""

import dataclasses
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals

from qlora_jax import lora
from qlora_jax.io.load import QuantSpec, load_model
from qlora_jax.lora import LoRAConfig
from qlora_jax.models import decoder
from qlora_jax.models.dropout import Dropout
from tests.llama_names import LINEARS
from tests.models.equations import equations
from tests.random_arrays import random_normal

pytestmark = pytest.mark.quick_compile

FAST = {"xla_backend_optimization_level": 0}  # compiles in half the time
LLAMAS = ("llama1", "llama2", "llama3", "linear_rope", "head_dim")
QUANTIZED = ("nf4_dq", "nf4", "fp4", "nf4_skip")  # the last in part, with its head


@jax.jit
def logits_of(model, tokens):
    hidden, _ = model(tokens)
    return model.logits(hidden)


def golden_file(folder):
    with np.load(folder / "logits.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def llama2(golden):
    """Grouped-query attention, two layers, float32 computation."""
    return load_model(golden / "llama" / "llama2", compute_dtype=jnp.float32)


@pytest.fixture(scope="module")
def tokens(golden):
    return jnp.asarray(golden_file(golden / "llama" / "llama2")["tokens"])


@pytest.mark.parametrize("name", LLAMAS)
def test_logits_of_transformers(golden, name):
    folder = golden / "llama" / name
    expected = golden_file(folder)
    found = logits_of(load_model(folder, compute_dtype=jnp.float32), expected["tokens"])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", QUANTIZED)
def test_logits_of_a_folder_that_bitsandbytes_quantized(golden, name):
    folder = golden / "bnb4bit" / name
    expected = golden_file(folder)
    found = logits_of(load_model(folder, compute_dtype=jnp.float32), expected["tokens"])
    np.testing.assert_allclose(found, expected["logits"], atol=1e-4, rtol=0)


def test_old_config_gives_the_same_logits(golden, tmp_path):
    folder = golden / "llama" / "llama3"
    shutil.copytree(folder, tmp_path / "old")
    shutil.copy(folder / "config_old_style.json", tmp_path / "old" / "config.json")
    expected = golden_file(folder)
    found = logits_of(load_model(tmp_path / "old", compute_dtype=jnp.float32), expected["tokens"])
    np.testing.assert_allclose(found, expected["logits"], atol=1e-4, rtol=0)


def test_bfloat16_computation_is_near(golden, tokens):
    model = load_model(golden / "llama" / "llama2", compute_dtype=jnp.bfloat16)
    expected = golden_file(golden / "llama" / "llama2")["logits"]
    found = logits_of(model, tokens)
    assert found.dtype == jnp.float32
    difference = np.abs(found - expected)
    assert difference.max() > 1e-4 and difference.mean() < 0.02 * expected.std()


def test_no_position_sees_what_follows(llama2, tokens):
    """d hidden[t] / d embedding of a later token is zero, of an earlier one is not."""
    graph, embedding, rest = nnx.split(llama2, nnx.PathContains("embedding"), ...)
    rows = llama2.embedding.get_value()[tokens[0, :8]].astype(jnp.float32)

    @partial(jax.jit, compiler_options=FAST)
    def seen(t):
        def at(rows):  # position t reads row t of an embedding of these rows alone
            model = nnx.merge(graph, jax.tree.map(lambda _: rows, embedding), rest)
            hidden, _ = model(jnp.arange(8, dtype=jnp.int32)[None])
            return jnp.sum(hidden[0, t] * jnp.arange(1.0, rows.shape[1] + 1))

        return jnp.abs(jax.grad(at)(rows)).sum(-1)

    for t in (0, 3, 7):
        gradient = np.asarray(seen(t))
        assert (gradient[: t + 1] > 0).all() and (gradient[t + 1 :] == 0).all()


def test_padding_at_the_right_changes_nothing(llama2, tokens):
    padded = jnp.concatenate([tokens, jnp.zeros((2, 8), jnp.int32)], axis=1)
    T = tokens.shape[1]
    np.testing.assert_allclose(logits_of(llama2, padded)[:, :T], logits_of(llama2, tokens), atol=2e-5, rtol=0)


def test_cache_gives_the_full_pass(llama2, tokens):
    """Ten tokens at once, then one at a time; the rows of the batch stand at different places."""
    full = logits_of(llama2, tokens)

    @jax.jit
    def step(cache, tokens, positions):
        hidden, cache = llama2(tokens, positions, cache)
        return cache, llama2.logits(hidden)

    positions = jnp.broadcast_to(jnp.arange(10, dtype=jnp.int32), (2, 10))
    cache, prompt = step(llama2.new_cache(2, 32), tokens[:, :10], positions)
    np.testing.assert_allclose(prompt, full[:, :10], atol=2e-5, rtol=0)
    lengths = np.asarray([10, 6])  # the second row writes over what stands at 6..9
    for _ in range(6):
        cache, one = step(cache, tokens[[0, 1], lengths][:, None], jnp.asarray(lengths, jnp.int32)[:, None])
        np.testing.assert_allclose(one[:, 0], full[[0, 1], lengths], atol=2e-5, rtol=0)
        lengths = lengths + 1


def gradient_of(model, tokens):
    """(loss of the adapter, its arguments)."""
    graph, adapter, base = lora.split(model)

    def loss(adapter):
        hidden, _ = nnx.merge(graph, adapter, base)(tokens, dropout_key=jax.random.key(0))
        return jnp.mean(jnp.sin(hidden.astype(jnp.float32)))

    return loss, adapter


def adapted(model, dropout: float = 0.0, targets: tuple[str, ...] = ("all-linear",)):
    """The model with an adapter whose B is not zero."""
    names = lora.attach(model, LoRAConfig(rank=2, alpha=4, dropout=dropout, targets=targets), jax.random.key(1))
    for place, name in enumerate(names):
        layer = lora.linear(model, name)
        b = layer.lora_b.get_value()
        layer.lora_b.set_value(0.1 * random_normal(place, b.shape))
    return model


def test_remat_changes_no_gradient(golden, tokens):
    """Dropout included: a recomputed pass draws the same masks."""
    gradients = []
    for remat in ("none", "block"):
        model = load_model(golden / "llama" / "llama2", compute_dtype=jnp.float32, remat=remat)
        loss, adapter = gradient_of(adapted(model, 0.3, ("v_proj",)), tokens)
        gradients.append(jax.jit(jax.grad(loss), compiler_options=FAST)(adapter))
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(a).max(), rtol=1e-4)


def test_each_layer_draws_its_own_dropout(llama2, tokens, monkeypatch):
    keys = []

    class Watched(Dropout):
        def __init__(self, rate, key):
            super().__init__(rate, key)
            jax.debug.callback(lambda data: keys.append(tuple(data.tolist())), jax.random.key_data(key.key))

    monkeypatch.setattr(decoder, "Dropout", Watched)
    for seed in (0, 1):
        jax.block_until_ready(llama2(tokens, dropout_key=jax.random.key(seed))[0])
    jax.effects_barrier()
    assert len(keys) == len(set(keys)) == 2 * llama2.config.L


@pytest.mark.parametrize("remat", ["none", "block"])
def test_no_16_bit_weight_is_kept_for_the_backward_pass(golden, capsys, remat):
    """What a whole model's gradient saves: packed codes may, a dequantized [O, I] may not."""
    model = adapted(load_model(golden / "llama" / "llama2", QuantSpec(), jnp.float32, remat))
    loss, adapter = gradient_of(model, jnp.ones((1, 5), jnp.int32))
    print_saved_residuals(loss, adapter)
    lines = capsys.readouterr().out.splitlines()
    shapes = [line.split(" ")[0] for line in lines]
    assert any(shape.startswith("u8[2,") for shape in shapes), shapes
    for name in LINEARS:
        O, I = lora.shape(model, name)
        weights = {f"[{O},{I}]", f"[{O * I}]", f"[2,{O},{I}]", f"[2,{O * I}]", f"[{I},{O}]", f"[2,{I},{O}]"}
        kept = [shape for shape in shapes if shape[shape.index("[") :] in weights and not shape.startswith("u8")]
        assert not kept, kept


def test_program_does_not_grow_with_depth(golden):
    """As many equations in the gradient for six layers as for two."""
    shallow = load_model(golden / "llama" / "llama2", QuantSpec(), jnp.float32)
    two, six = (equations(deepened(shallow, times)) for times in (1, 3))
    assert two == six > 100


def deepened(model, times: int):
    """The gradient's jaxpr for `times` as many layers."""
    graph, blocks, rest = nnx.split(model, nnx.PathContains("blocks"), ...)
    deeper = nnx.merge(graph, jax.tree.map(lambda x: np.concatenate([x] * times), blocks), rest)
    deeper.config = dataclasses.replace(model.config, L=model.config.L * times)
    lora.attach(deeper, LoRAConfig(rank=2), jax.random.key(0))
    loss, adapter = gradient_of(deeper, jnp.ones((1, 5), jnp.int32))
    return jax.make_jaxpr(jax.grad(loss))(adapter).jaxpr
