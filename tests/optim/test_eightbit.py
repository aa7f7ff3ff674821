"""8-bit moments are bitsandbytes' bit for bit, cut where pages cut, and never become worse than their map allows."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qlora_jax.optim.eightbit import BLOCK, Quantized, _nearest, adamw8bit, dequantize, lion8bit, quantize
from qlora_jax.optim.paged import PagedOptimizer
from qlora_jax.optim.pages import Pages, RowWise, separability, state_bytes
from qlora_jax.quant.codebooks import dynamic_map
from qlora_jax.train.checkpoints import Checkpoints
from tests.not_finite import every_pattern, finite_by_definition

RATE, DECAY = 1e-2, 0.1  # as the golden file
OPTIMIZERS = {  # that they are RowWise: test_may_be_cut_by_rows
    "adamw": RowWise(*adamw8bit(RATE, 0.9, 0.999, 1e-8, DECAY)),
    "lion": RowWise(*lion8bit(RATE, 0.9, 0.99, DECAY)),
}
MAPS = {"signed": True, "unsigned": False}
UPDATES = 3
SMALLEST = np.finfo(np.float32).tiny  # normal number

is_quantized = lambda leaf: isinstance(leaf, Quantized)  # noqa: E731
jit_quantize = jax.jit(quantize, static_argnums=1)
jit_dequantize = jax.jit(dequantize, static_argnums=1)


@pytest.fixture(scope="module")
def arrays(golden):
    with np.load(golden / "optim8.npz") as file:
        return dict(file)


@pytest.mark.parametrize("kind", MAPS)
def test_map_is_bitsandbytes(arrays, kind):
    np.testing.assert_array_equal(np.float32(dynamic_map(MAPS[kind])), arrays[f"map/{kind}"])


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("case", ["normal", "decades", "sizes", "ties", "ragged"])
def test_codes_are_bitsandbytes_bit_for_bit(arrays, case, kind):
    key = f"{case}/{kind}"
    q = jit_quantize(jnp.asarray(arrays[f"{key}/values"])[None], MAPS[kind])
    np.testing.assert_array_equal(q.codes[0], arrays[f"{key}/codes"])
    np.testing.assert_array_equal(q.absmax[0], arrays[f"{key}/absmax"])
    np.testing.assert_array_equal(jit_dequantize(q, MAPS[kind])[0], arrays[f"{key}/dequantized"])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", ["whole", "ragged", "small"])
def test_updates_are_bitsandbytes(arrays, name, shape):
    """Four updates of two layers of unlike rows. Sums may round otherwise by a bit, which moves a value beside a
    midpoint to the next code; one in a thousand is allowed."""
    tx = OPTIMIZERS[name]
    params = jnp.asarray(arrays[f"{shape}/start"], jnp.float32)
    state, update, found = tx.init(params), jax.jit(tx.update), []
    for gradient in arrays[f"{shape}/gradients"]:
        updates, state = update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    first, last = arrays[f"{name}/{shape}/params"]
    np.testing.assert_allclose(found[0], first, rtol=1e-6, atol=1e-6)
    assert np.mean(np.abs(found[-1] - last) > 2e-6) <= 1e-3
    for number, moment in enumerate(state[0][-2:] if name == "adamw" else state[0], start=1):
        if shape == "small":
            assert moment.dtype == jnp.float32
            np.testing.assert_allclose(moment, arrays[f"{name}/{shape}/moment{number}"], rtol=1e-5, atol=1e-9)
            continue
        difference = np.abs(np.asarray(moment.codes, int) - arrays[f"{name}/{shape}/codes{number}"])
        assert difference.max() <= 1 and np.mean(difference) <= 1e-3
        np.testing.assert_allclose(moment.absmax, arrays[f"{name}/{shape}/absmax{number}"], rtol=1e-6)


def nearest_distance(scaled: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.abs(scaled[:, None] - values[None]).min(axis=1)


@pytest.mark.parametrize("kind", MAPS)
@given(
    x=hnp.arrays(np.float32, (2, 300), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    exponent=st.integers(-149, 20),
)
def test_every_value_has_the_nearest_code(kind, x, exponent):
    """Of all sizes: blocks of zeros, of subnormal numbers and of numbers 10^60 apart too."""
    x = np.ldexp(x if MAPS[kind] else np.abs(x), exponent).astype(np.float32)
    q = jit_quantize(jnp.asarray(x), MAPS[kind])
    back = np.asarray(jit_dequantize(q, MAPS[kind]))
    assert np.isfinite(back).all() and q.codes.dtype == jnp.uint8
    values = np.float64(dynamic_map(MAPS[kind]))
    for row, codes, scales in zip(x, np.asarray(q.codes), np.asarray(q.absmax), strict=True):
        for block in range(2):
            part = slice(block * BLOCK, min((block + 1) * BLOCK, 300))
            largest = np.abs(row[part]).max()
            if largest < SMALLEST:
                assert scales[block] == 0
                continue
            assert scales[block] == largest
            scaled = np.float64(row[part]) / np.float64(largest)
            distance = np.abs(scaled - values[codes[part]])
            slack = 4e-7 + SMALLEST / largest  # float32's scaling, and subnormal numbers, which CPUs flush to zero
            assert (distance <= nearest_distance(scaled, values) + slack).all()
            assert distance.max() <= 0.0071 + slack  # half the widest gap, and -1 beside the map's -0.993


@pytest.mark.parametrize("kind", MAPS)
def test_what_is_not_finite_spoils_its_block_alone(kind):
    """A block for each bit pattern, that pattern in it: none of its values is finite when it is read back."""
    patterns = every_pattern("float32")[::64]
    patterns = patterns if MAPS[kind] else np.abs(patterns)
    x = np.random.default_rng(0).random((len(patterns), BLOCK), np.float32) + np.float32(0.1)
    x[np.arange(len(x)), np.arange(len(x)) % BLOCK] = patterns
    is_finite = finite_by_definition(x).all(axis=1)
    for shape in ((len(x) // 4, 4 * BLOCK), (len(x), BLOCK)):
        q = jit_quantize(jnp.asarray(x.reshape(shape)), MAPS[kind])
        back = np.isfinite(jit_dequantize(q, MAPS[kind])).reshape(x.shape)
        np.testing.assert_array_equal(back.all(axis=1), is_finite)
        np.testing.assert_array_equal(back.any(axis=1), is_finite)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_moments(name, bad):
    """No moment of its block is finite afterwards, so that whatever reads the state finds out; others are untouched."""
    tx, params = OPTIMIZERS[name], jnp.ones((2, 20 * BLOCK))
    gradients = jnp.full(params.shape, 0.5)
    update = jax.jit(tx.update)
    _, state = update(gradients, tx.init(params), params)
    _, state = update(gradients.at[1, 3 * BLOCK + 7].set(bad), state, params)
    _, state = update(gradients, state, params)
    moments = [leaf for leaf in jax.tree.leaves(state, is_leaf=is_quantized) if is_quantized(leaf)]
    assert len(moments) == 2 - (name == "lion")
    for number, moment in enumerate(moments):
        found = np.isfinite(dequantize(moment, signed=number == 0)).reshape(2, 20, BLOCK)
        assert not found[1, 3].any()
        assert found.sum() == found.size - BLOCK


@pytest.mark.parametrize("kind", MAPS)
def test_zeros_and_subnormal_numbers_stay_zeros(kind):
    x = np.zeros((3, 2 * BLOCK), np.float32)
    x[1, 3], x[2, BLOCK + 5] = 1e-40, 2.0
    back = np.asarray(jit_dequantize(jit_quantize(jnp.asarray(x), MAPS[kind]), MAPS[kind]))
    assert back[2, BLOCK + 5] == 2.0
    assert np.count_nonzero(back) == 1


@pytest.mark.parametrize("kind", MAPS)
def test_look_up_by_leading_bits_is_the_search(kind):
    """Of every 101st float32 from 0 to 1, and of all midpoints and their neighbours."""
    values = np.float32(dynamic_map(MAPS[kind]))
    midpoints = (values[:-1] + values[1:]) / np.float32(2)
    x = np.arange(0, 0x3F800001, 101, dtype=np.uint32).view(np.float32)
    beside = [np.nextafter(midpoints, np.float32(side)) for side in (2, -2)]
    x = np.concatenate([x, -x, midpoints, *beside])
    x = x if MAPS[kind] else x[x >= 0]
    found = jax.jit(_nearest, static_argnums=1)(jnp.asarray(x), MAPS[kind])
    np.testing.assert_array_equal(found, np.searchsorted(midpoints, x, side="left"))


@pytest.mark.parametrize("kind", MAPS)
def test_rows_are_quantized_each_for_itself(kind):
    x = np.random.default_rng(0).standard_normal((5, 3, 111)).astype(np.float32) ** 2  # 333 values a row
    whole = jit_quantize(jnp.asarray(x), MAPS[kind])
    assert whole.codes.shape == x.shape and whole.absmax.shape == (5, 2)
    for row in range(5):
        assert_same_bits(jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], whole),
                         jit_quantize(jnp.asarray(x[row : row + 1]), MAPS[kind]))  # fmt: skip


def tree(seed: int) -> dict[str, jax.Array]:
    """Rows of whole blocks, of a short last block, and too small for 8 bits."""
    rng = np.random.default_rng(seed)
    shapes = {"whole": (5, 16, 256), "ragged": (3, 67, 65), "small": (5, 6, 7)}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


@cache
def pages_of(name: str, page_bytes: int) -> Pages:
    """Of `tree`, shared by optimizers: the updates of its pages are traced once."""
    return Pages(OPTIMIZERS[name], tree(0), page_bytes)


def make(name: str, page_bytes: int, resident_bytes: float) -> PagedOptimizer:
    return PagedOptimizer(pages_of(name, page_bytes), tree(0), resident_bytes)


shared = cache(make)  # with the programs that it compiled: what a run begins with is not in it


def run(optimizer: PagedOptimizer, updates: int = UPDATES, params=None, states=None, first: int = 0):
    params = tree(0) if params is None else params
    states = optimizer.init(params) if states is None else states
    for k in range(first, first + updates):
        params, states = optimizer.update(params, tree(k + 1), states)
    return params, states


def assert_same_bits(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.quick_compile
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_may_be_cut_by_rows(name):
    assert separability(optax.GradientTransformation(*OPTIMIZERS[name])) == "rows"


@pytest.mark.quick_compile
@pytest.mark.parametrize("page_bytes", [1, 20_000, 1 << 20])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_paged_is_unpaged_bit_for_bit_and_optax(name, page_bytes):
    tx = OPTIMIZERS[name]
    (params, states), unpaged = (run(shared(name, page_bytes, resident)) for resident in (0, math.inf))
    assert_same_bits((params, states), unpaged)
    arrays = [leaf for leaf in jax.tree.leaves(states) if leaf.ndim]
    assert {leaf.sharding.memory_kind for leaf in arrays} == {"pinned_host"}
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype("uint8"), jnp.dtype("float32")}
    expected, state, update = tree(0), tx.init(tree(0)), jax.jit(tx.update)
    for k in range(UPDATES):
        updates, state = update(tree(k + 1), state, expected)
        expected = optax.apply_updates(expected, updates)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert np.mean(np.abs(x - y) > 1e-6 + 1e-6 * np.abs(y)) <= 1e-3  # a code beside a midpoint


@pytest.mark.quick_compile
@pytest.mark.parametrize(("name", "moments"), [("adamw", 2), ("lion", 1)])
def test_bytes_of_state(name, moments):
    """One byte a moment and four for a block of 256; four below 4,096 values a row."""
    large, small = jax.ShapeDtypeStruct((8, 64, 4096), jnp.float32), jax.ShapeDtypeStruct((8, 4095), jnp.float32)
    scalars = state_bytes(OPTIMIZERS[name], [])
    assert (state_bytes(OPTIMIZERS[name], [large]) - scalars) / large.size == moments * (1 + 4 / 256)
    assert (state_bytes(OPTIMIZERS[name], [small]) - scalars) / small.size == moments * 4


@pytest.mark.quick_compile
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_goes_on_exactly(name, tmp_path):
    whole = run(shared(name, 20_000, 0), updates=4)
    params, states = run(shared(name, 20_000, 0), updates=2)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(2, params, states, wait=True)
    checkpoints.close()
    again, fresh = Checkpoints(tmp_path, keep=1), make(name, 20_000, 0)
    _, params, states = again.restore(tree(0), fresh.init(tree(0)))
    again.close()
    assert any(leaf.dtype == np.uint8 for leaf in jax.tree.leaves(states))
    assert_same_bits(run(fresh, 2, params, fresh.place(states), first=2), whole)


@pytest.mark.quick_compile
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_of_zero_move_nothing(name):
    """LoRA's A has none at the first step: no division of zero by zero, and no sign out of a rounded moment."""
    tx = OPTIMIZERS[name]
    params = {"a": jnp.zeros((2, 4096))}
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(params, state, params)
        assert not np.any(updates["a"])
    assert isinstance(state[0].mu["a"], Quantized)
