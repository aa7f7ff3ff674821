"""LLM.int8()'s product: against bitsandbytes' (tests/golden/int8.npz), by definition in NumPy; gradients and packs."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import print_saved_residuals

from pallas_kernels.int8_matmul import Packed, api, dequantize, matmul_joined
from pallas_kernels.int8_matmul.rows import as_float16

pytestmark = pytest.mark.quick_compile

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "int8.npz")
CASES = [key.removesuffix("/y") for key in GOLDEN if key.endswith("/y")]
# bitsandbytes' CPU path multiplies by 6.200124e-05 where 1 / 127^2 is 6.200012e-05, and rounds twice to x's dtype
TOLERANCE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1.2e-2}  # of the largest value of the row
_jitted = jax.jit(matmul_joined, static_argnums=2)


def golden(key: str) -> np.ndarray:
    value = GOLDEN[key]
    return value.view(ml_dtypes.bfloat16) if value.dtype == np.uint16 else value


def weight(name: str) -> Packed:
    return Packed(jnp.asarray(GOLDEN[f"{name}/codes"]), jnp.asarray(GOLDEN[f"{name}/absmax"]))


def random_weight(O: int, I: int, seed: int = 0) -> Packed:
    rng = np.random.default_rng(seed)
    codes, absmax = rng.integers(-127, 128, (O, I)), rng.lognormal(-3, 1, O)
    absmax[0] = 0
    return Packed(jnp.asarray(codes, jnp.int8), jnp.asarray(absmax, jnp.float32))


@pytest.mark.parametrize("case", CASES)
def test_products_and_gradients_are_bitsandbytes(case):
    x, y, dy, dx = (golden(f"{case}/{part}") for part in ("x", "y", "dy", "dx"))
    w, threshold = weight(str(GOLDEN[f"{case}/of"])), float(GOLDEN[f"{case}/threshold"])
    found, pull = jax.vjp(lambda x: _jitted(x, (w,), threshold), jnp.asarray(x))
    (gradient,) = pull(jnp.asarray(dy))
    assert found.dtype == gradient.dtype == x.dtype
    for mine, theirs in ((found, y), (gradient, dx)):
        mine, theirs = np.asarray(mine, np.float64), theirs.astype(np.float64)
        error = np.abs(mine - theirs).max(axis=1) / np.abs(theirs).max(axis=1).clip(1e-6)
        assert error.max() < TOLERANCE[x.dtype.name]


def by_definition(x: np.ndarray, w: Packed, threshold: float) -> np.ndarray:
    """float64 [M, O], from x [M, I] that float16 holds."""
    x, codes, absmax = x.astype(np.float64), np.asarray(w.codes, np.float64), np.asarray(w.absmax, np.float64)
    x16 = x.astype(np.float16).astype(np.float32)
    is_outlier = np.abs(x16) >= (threshold or np.inf)
    columns = is_outlier.any(axis=0)
    inside = np.where(is_outlier, np.float32(0), x16)
    scale = np.abs(inside).max(axis=1, keepdims=True)
    factor = np.float32(1) / np.where(scale == 0, np.float32(1), scale) * np.float32(127)
    inside = np.where(columns, 0, np.rint(inside * factor)).astype(np.float64)
    return ((inside @ codes.T) * scale / 127 + np.where(columns, x, 0) @ codes.T) * absmax / 127


@settings(max_examples=25)
@given(
    st.sampled_from([(4, 1, 2), (6, 130, 33)]),
    st.sampled_from([0.0, 6.0]),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from([0.5, 2.0, 8.0]),
    st.integers(0, 2**32 - 1),
)
def test_any_product(sizes, threshold, dtype, size, seed):
    M, I, O = sizes
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((M, I)) * size
    x[rng.random((M, I)) < 0.05] = 0
    x[0] *= rng.integers(2)
    x = x.astype(dtype)
    w = random_weight(O, I, seed % 7)
    y = np.asarray(_jitted(jnp.asarray(x), (w,), threshold), np.float64)
    expected = by_definition(x, w, threshold)
    epsilon = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-10}[dtype]
    assert (np.abs(y - expected) <= epsilon * np.abs(expected).max(axis=0) + 1e-7).all()


def test_one_value_beyond_the_threshold_changes_the_way_of_its_column_alone():
    """Its column in 16 bits for all rows, the scales of other rows as before."""
    w, x = random_weight(8, 100), np.random.default_rng(3).standard_normal((5, 100)).astype(np.float32)
    with_outlier = x.copy()
    with_outlier[2, 70] = 1000.0
    y, changed = (np.asarray(_jitted(jnp.asarray(v), (w,), 6.0)) for v in (x, with_outlier))
    column = np.asarray(w.codes)[:, 70] / 127.0 * np.asarray(w.absmax)
    others = [0, 1, 3, 4]
    scale = np.abs(x).max(axis=1, keepdims=True) / 127
    rounded = np.rint(x[:, 70:71] / scale) * scale
    expected = y + (x[:, 70:71] - rounded) * column
    np.testing.assert_allclose(changed[others], expected[others], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(changed[2], (y + (1000.0 - rounded) * column)[2], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows(value):
    w, x = random_weight(6, 80, 1), np.random.default_rng(4).standard_normal((4, 80)).astype(np.float32)
    x[1, 3] = value
    for threshold in (0.0, 6.0):
        y = np.asarray(_jitted(jnp.asarray(x), (w,), threshold))
        assert not np.isfinite(y[1, 1:]).any() and np.isfinite(y[[0, 2, 3]]).all()


def test_beyond_float16_without_a_threshold():
    """bitsandbytes overflows there; here the values stay what they are."""
    w, x = random_weight(6, 80), np.random.default_rng(4).standard_normal((4, 80)).astype(np.float32)
    x[1] *= 1e6
    y = np.asarray(_jitted(jnp.asarray(x), (w,), 0.0))
    expected = x @ np.asarray(dequantize(w.codes, w.absmax, jnp.float32)).T
    assert np.abs(y - expected).max() < 0.02 * np.abs(expected).max()


def test_as_float16():
    bits = np.arange(2**16, dtype=np.uint32) << 16
    every = np.concatenate([bits, bits | 0x1000, bits | 0x0FFF, bits | 0x1001, bits | 0x3000]).view(np.float32)
    every = every[np.isfinite(every) & (np.abs(every) < 65_519)]
    np.testing.assert_array_equal(as_float16(jnp.asarray(every)), every.astype(np.float16).astype(np.float32))


def test_joined_weights_are_those_apart():
    x = jnp.asarray(np.random.default_rng(5).standard_normal((2, 3, 90)).astype(np.float32)).at[1, 2, 8].set(9.0)
    first, second = random_weight(5, 90, 1), random_weight(12, 90, 2)
    apart = [_jitted(x, (each,), 6.0) for each in (first, second)]
    np.testing.assert_array_equal(_jitted(x, (first, second), 6.0), jnp.concatenate(apart, axis=-1))
    dy = jnp.asarray(np.random.default_rng(6).standard_normal((2, 3, 17)).astype(np.float32))
    dx = jax.vjp(lambda x: _jitted(x, (first, second), 6.0), x)[1](dy)[0]
    w = [np.asarray(dequantize(each.codes, each.absmax, jnp.float32)) for each in (first, second)]
    np.testing.assert_allclose(dx, np.asarray(dy) @ np.concatenate(w), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("few", [2, 64])  # more outlier columns than are taken out, and fewer
def test_a_pack_is_its_members(few, monkeypatch):
    """Outlier columns are each member's own, whichever of them have any; W has no axis of members."""
    monkeypatch.setattr(api, "FEW", few)
    w = random_weight(6, 70)
    x = np.random.default_rng(7).standard_normal((3, 4, 70)).astype(np.float32)
    x[1, 2, 9] = x[1, 0, 30] = x[1, 3, 44] = 8.0  # the second has outliers, the others have none
    product = partial(matmul_joined, packed=(w,), threshold=6.0)
    together = jax.jit(jax.vmap(lambda x: product(x)))(x)
    alone = jax.jit(lambda x: product(x))
    np.testing.assert_allclose(together, np.stack([alone(member) for member in x]), rtol=1e-6, atol=1e-6)
    text = jax.jit(jax.vmap(lambda x: product(x))).lower(x).as_text()
    assert "stablehlo.case" in text and "tensor<3x6x70xi8>" not in text


def test_only_packed_arrays_are_kept(capsys):
    w = random_weight(6, 70)
    print_saved_residuals(lambda x, w: jnp.sum(_jitted(x, (w,), 6.0)), jnp.ones((4, 70)), w)
    kept = capsys.readouterr().out
    assert "i8[6,70]" in kept and "f32[6,70]" not in kept and "f32[4,70]" not in kept


def test_no_rows_and_wrong_sizes():
    w = random_weight(6, 70)
    assert _jitted(jnp.zeros((0, 70)), (w,), 6.0).shape == (0, 6)
    with pytest.raises(ValueError, match=r"x has 71 features, the weight \[out, in\] = \[6, 70\] takes 70"):
        matmul_joined(jnp.zeros((2, 71)), (w,), 6.0)


def test_the_product_is_of_bytes_into_int32():
    lowered = _jitted.lower(jnp.ones((4, 70), jnp.bfloat16), (random_weight(6, 70),), 6.0)
    assert "(tensor<4x70xi8>, tensor<6x70xi8>) -> tensor<4x6xi32>" in lowered.as_text()
