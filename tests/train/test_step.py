"""Steps against torch's (tests/golden/make_train.py), and gradients that do not depend on how a batch is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from qlora_jax import lora
from qlora_jax.io import peft
from qlora_jax.io.load import QuantSpec, load_model
from qlora_jax.lora import LoRAConfig
from qlora_jax.optim.paged import PagedOptimizer
from qlora_jax.optim.pages import Pages, RowWise
from qlora_jax.train.memory import Program
from qlora_jax.train.step import make_evaluation, make_gradient
from tests.random_arrays import random_normal

FAST = {"xla_backend_optimization_level": 0}  # compiles in half the time
FULLY_OPTIMIZED = {"base32": "none", "nf4_dq": "nf4"}
SELDOM = "base32_seldom_clipped"


@pytest.fixture(scope="module")
def batches(golden):
    with np.load(golden / "train" / "batches.npz") as file:
        return file["tokens"], file["loss_mask"]


@pytest.mark.parametrize("variant", [*FULLY_OPTIMIZED, pytest.param(SELDOM, marks=pytest.mark.quick_compile)])
def test_six_steps_of_torch(golden, batches, tmp_path, variant):
    folder = golden / "train" / variant
    with np.load(folder / "steps.npz") as file:
        expected = dict(file)
    model = load_model(golden / "llama" / "llama1", QuantSpec(FULLY_OPTIMIZED.get(variant, "none")), jnp.float32)
    config = peft.load_adapter(model, golden / "train" / "init")
    graph, adapter, base = lora.split(model)
    max_norm = float(expected["max_norm"])
    # as in a run: jitted, it would be compiled again for arrays that an update has put where they belong
    gradient = Program(make_gradient(graph, loss_chunk=13, max_grad_norm=max_norm))
    pages = Pages(RowWise(*optax.adamw(1e-2, weight_decay=0.0)), adapter, page_bytes=1 << 20)
    optimizer = PagedOptimizer(pages, adapter, resident_bytes=0)
    states, losses, norms = optimizer.init(adapter), [], []
    for tokens, mask in zip(*batches, strict=True):
        grads, metrics = gradient(adapter, base, tokens.reshape(2, 4, -1), mask.reshape(2, 4, -1), None)
        assert float(metrics.target_tokens) == mask[:, 1:].sum()
        adapter, states = optimizer.update(adapter, grads, states, metrics.factor)
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))
    np.testing.assert_allclose(losses, expected["loss"], rtol=1e-4)
    np.testing.assert_allclose(norms, expected["grad_norm"], rtol=2e-3)
    peft.write_adapter(tmp_path / "out", adapter, config, "llama1")
    theirs, ours = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "out"))
    start = load_file(golden / "train" / "init" / "adapter_model.safetensors")
    assert theirs.keys() == ours.keys()
    floor = float(expected["adapter_difference_float64"])
    for key, value in theirs.items():
        assert np.abs(value - start[key]).max() > 5e-3
        np.testing.assert_allclose(ours[key], value, atol=max(1e-4, 10 * floor), rtol=0, err_msg=key)


@pytest.fixture(scope="module")
def parts(golden):
    """A model with one trained projection (it compiles fast): graph, adapter, base."""
    model = load_model(golden / "llama" / "llama1", QuantSpec("none"), jnp.float32, remat="none")
    lora.attach(model, LoRAConfig(rank=2, targets=("v_proj",), dropout=0.2), jax.random.key(0))
    layer = lora.linear(model, "self_attn.v_proj")
    layer.lora_b.set_value(0.1 * random_normal(1, layer.lora_b.get_value().shape))
    return lora.split(model)


@pytest.fixture(scope="module")
def gradient(parts):
    """One program whatever norm is clipped to; 0 does not clip."""

    def clipped(max_grad_norm, *arguments):
        return make_gradient(parts[0], 64, max_grad_norm)(*arguments)

    program = jax.jit(clipped, compiler_options=FAST)
    return lambda *arguments, max_grad_norm=0.0: program(np.float32(max_grad_norm), *arguments)


@pytest.mark.quick_compile
def test_the_cut_into_micro_batches_changes_nothing(parts, gradient, batches):
    """One micro-batch holds few target tokens, the other many: a mean of means would differ."""
    _, adapter, base = parts
    tokens, mask = batches[0][0], batches[1][0]
    results = [gradient(adapter, base, *(x.reshape(G, 8 // G, -1) for x in (tokens, mask)), None) for G in (1, 2)]
    means = [(jax.tree.map(lambda g, m=metrics: g * m.factor, sums), metrics) for sums, metrics in results]
    for a, b in zip(*map(jax.tree.leaves, means), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.quick_compile
def test_a_micro_batch_without_targets_adds_nothing(parts, gradient, batches):
    _, adapter, base = parts
    tokens, mask = batches[0][0].reshape(2, 4, -1), batches[1][0].reshape(2, 4, -1).copy()
    mask[0] = False
    grads, metrics = gradient(adapter, base, tokens, mask, None)
    other = tokens.copy()
    other[0] = 5
    others, other_metrics = gradient(adapter, base, other, mask, None)
    assert float(metrics.target_tokens) == mask[1, :, 1:].sum()
    assert float(metrics.loss) == float(other_metrics.loss) > 0
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
        np.testing.assert_array_equal(a, b)
    nothing, empty = gradient(adapter, base, tokens, np.zeros_like(mask), None)
    assert (float(empty.loss), float(empty.target_tokens), float(empty.grad_norm)) == (0, 0, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nothing))


@pytest.mark.quick_compile
def test_gradient_is_the_slope_of_the_loss(parts, gradient, batches):
    """A small step along the gradient lowers the evaluated loss by its squared norm."""
    graph, adapter, base = parts
    tokens, mask = batches[0][0], batches[1][0]
    evaluate = jax.jit(make_evaluation(graph, 64), compiler_options=FAST)
    grads, metrics = gradient(adapter, base, tokens[None], mask[None], None)
    grads = jax.tree.map(lambda g: g * metrics.factor, grads)
    total, count = evaluate(adapter, base, tokens, mask)
    assert float(total / count) == pytest.approx(float(metrics.loss), rel=1e-5)
    step = 0.02 / float(metrics.grad_norm)
    there, back = (
        float(
            evaluate(jax.tree.map(lambda a, g, s=sign: a + s * step * g, adapter, grads), base, tokens, mask)[0] / count
        )
        for sign in (1, -1)
    )
    assert (there - back) / 2 == pytest.approx(step * float(metrics.grad_norm) ** 2, rel=0.02)


@pytest.mark.quick_compile
def test_clipping_scales_to_the_norm(parts, gradient, batches):
    _, adapter, base = parts
    grads, metrics = gradient(adapter, base, batches[0][0][None], batches[1][0][None], None, max_grad_norm=1e-3)
    assert float(metrics.grad_norm) > 1e-3
    assert float(optax.tree.norm(grads) * metrics.factor) == pytest.approx(1e-3, rel=1e-5)


@pytest.mark.quick_compile
def test_each_micro_batch_draws_its_own_dropout(parts, gradient, batches):
    """The same rows twice: with one mask for both, the gradient of the pair would equal that of one."""
    _, adapter, base = parts
    tokens, mask = (np.stack([x[0][4:]] * 2) for x in batches)
    pair, _ = gradient(adapter, base, tokens, mask, jax.random.key(0))
    again, _ = gradient(adapter, base, tokens, mask, jax.random.key(0))
    swapped, _ = gradient(adapter, base, tokens, np.stack([mask[0], np.zeros_like(mask[0])]), jax.random.key(0))
    for a, b, c in zip(*map(jax.tree.leaves, (pair, again, swapped)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(a - c).max() > 1e-4 * np.abs(a).max()


@pytest.mark.parametrize("remat", ["none", "block"])  # the gradient of the whole, and layer by layer
def test_what_is_not_finite_anywhere_shows_in_loss_or_norm(parts, gradient, batches, remat):
    """One value of any array that the batch meets: adapter, linear layers, norms, head, a token's embedding."""
    graph, adapter, base = parts
    if remat == "block":
        model = nnx.merge(graph, adapter, base)
        model.remat = remat
        graph, adapter, base = lora.split(model)
        gradient = jax.jit(make_gradient(graph, 64, 0.3), compiler_options=FAST)
    tokens, mask = (x[0].reshape(1, 8, -1) for x in batches)
    places, treedef = jax.tree.flatten((adapter, base))
    rng = np.random.default_rng(0)
    for number, leaf in enumerate(places):
        flat = np.asarray(leaf).copy()
        if flat.shape == (96, 32):  # embedding and head: the row of a token that is there, and is learned
            flat[tokens[0, 0, 1], 3] = np.nan
        else:
            flat.reshape(-1)[rng.integers(flat.size)] = (np.nan, np.inf, -np.inf)[number % 3]
        spoiled = jax.tree.unflatten(treedef, [*places[:number], jnp.asarray(flat), *places[number + 1 :]])
        _, metrics = gradient(*spoiled, tokens, mask, None)
        assert not (np.isfinite(metrics.loss) and np.isfinite(metrics.grad_norm)), (number, leaf.shape)
