"""int8 weights: against bitsandbytes' (tests/golden/int8.npz), by definition in NumPy; what is refused and kept."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qlora_jax as qj
from qlora_jax.quant import int8
from qlora_jax.quant.bitsandbytes import part_of
from qlora_jax.quant.tensor import in_8_bits, temporary_bytes

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "int8.npz")
WEIGHTS = [key.removesuffix("/codes") for key in GOLDEN if key.endswith("/codes")]


def golden(key: str) -> np.ndarray:
    value = GOLDEN[key]
    return value.view(ml_dtypes.bfloat16) if value.dtype == np.uint16 else value


def by_definition(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """codes, absmax of w [O, I], of values that float16 holds without overflow."""
    w = w.astype(np.float16).astype(np.float32)
    absmax = np.abs(w).max(axis=1)
    scale = np.float32(1) / np.where(absmax == 0, np.float32(1), absmax) * np.float32(127)
    return np.rint(w * scale[:, None]).astype(np.int8), absmax


@pytest.mark.parametrize("name", WEIGHTS)
def test_codes_and_scales_are_bitsandbytes(name):
    q = qj.quantize(jnp.asarray(golden(f"{name}/weight")), "int8")
    np.testing.assert_array_equal(q.codes, GOLDEN[f"{name}/codes"])
    np.testing.assert_array_equal(q.absmax, GOLDEN[f"{name}/absmax"])
    assert q.codes.dtype == jnp.int8 and q.absmax.dtype == jnp.float32


@pytest.mark.parametrize("name", [name for name in WEIGHTS if f"{name}/values" in GOLDEN])
def test_values_are_bitsandbytes(name):
    q = qj.quantize(jnp.asarray(golden(f"{name}/weight")), "int8")
    np.testing.assert_array_equal(qj.dequantize(q, jnp.float32), GOLDEN[f"{name}/values"])


SHAPES = [(1, 7), (5, 1), (17, 33)]


@given(
    st.sampled_from(SHAPES),
    st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    st.integers(-30, 14),
    st.integers(0, 2**32 - 1),
)
def test_any_weight(shape, dtype, exponent, seed):
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal(shape) * 2.0**exponent).clip(-60_000, 60_000)
    w[rng.random(shape) < 0.1] = 0
    w[rng.integers(shape[0])] *= rng.integers(2)  # now and then a row of zeros
    w = w.astype(dtype)
    q = qj.quantize(jnp.asarray(w), "int8")
    codes, absmax = by_definition(w)
    np.testing.assert_array_equal(q.codes, codes)
    np.testing.assert_array_equal(q.absmax, absmax)
    values = np.asarray(qj.dequantize(q, jnp.float32))
    assert (np.abs(values - w.astype(np.float16).astype(np.float32)) <= absmax[:, None] / 254 * (1 + 1e-5)).all()


def test_all_halves_and_subnormal_numbers_of_float16():
    """What one rounding in float16 decides: every kind of number near the middle between two of its values."""
    near = np.float32(2.0) ** np.arange(-26, 15)[:, None] * (1 + np.arange(1, 40, 2, dtype=np.float32) / 4096)
    w = np.concatenate([near, -near], axis=1)
    q = qj.quantize(jnp.asarray(w), "int8")
    codes, absmax = by_definition(w)
    np.testing.assert_array_equal(q.absmax, absmax)
    np.testing.assert_array_equal(q.codes, codes)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "the weight holds NaN"),
        (np.inf, "the weight holds inf"),
        (65_520.0, r"6.55e\+04, too large for float16, in which int8"),
    ],
)
def test_weights_that_are_refused(value, message):
    w = np.ones((3, 40), np.float32)
    w[1, 7] = value
    with pytest.raises(qj.InputError, match=message):
        qj.quantize(jnp.asarray(w), "int8")


def test_block_size_and_double_quantization_are_not_read():
    w = jnp.asarray(GOLDEN["odd_float16/weight"])
    plain, other = qj.quantize(w, "int8"), qj.quantize(w, "int8", block_size=7, double_quant=False)
    assert jax.tree.structure(plain) == jax.tree.structure(other) and not plain.double_quant
    np.testing.assert_array_equal(plain.codes, other.codes)


def test_bits_and_temporary_bytes():
    """8 bits and a scale a row; a large weight is quantized without a copy of it in 32 bits."""
    w = jax.ShapeDtypeStruct((1024, 4096), jnp.bfloat16)
    q = jax.eval_shape(lambda w: qj.quantize(w, "int8"), w)
    assert q.bits_per_param == 8 + 32 / 4096
    stats = int8.quantize_packed.lower(w).compile().memory_analysis()
    assert stats.temp_size_in_bytes <= temporary_bytes(1024 * 4096, "int8", 0) < 9.6 * 2**22
    w = jax.ShapeDtypeStruct((4099, 4096), jnp.bfloat16)
    stats = int8.quantize_packed.lower(w).compile().memory_analysis()
    assert stats.temp_size_in_bytes <= temporary_bytes(4099 * 4096, "int8", 0) < 9.6 * 2**22


def test_a_large_weight_by_runs_of_rows(monkeypatch):
    monkeypatch.setattr(int8, "CHUNK", 300)
    w = np.random.default_rng(2).standard_normal((31, 41)).astype(np.float32)  # 7 rows at a time
    q = qj.quantize(jnp.asarray(w), "int8")
    codes, absmax = by_definition(w)
    np.testing.assert_array_equal(q.codes, codes)
    np.testing.assert_array_equal(q.absmax, absmax)


class TestFiles:
    def tensors(self) -> dict[str, np.ndarray]:
        q = qj.quantize(jnp.asarray(GOLDEN["odd_float16/weight"]), "int8")
        return int8.to_file(q.codes, q.absmax, "a.b.weight")

    def test_there_and_back(self):
        tensors = self.tensors()
        assert set(tensors) == {"a.b.weight", "a.b.SCB", "a.b.weight_format"}
        q = in_8_bits(int8.from_file(tensors, "a.b.weight"))
        assert q.shape == (33, 7) and q.format == "int8"
        np.testing.assert_array_equal(q.codes, GOLDEN["odd_float16/codes"])
        np.testing.assert_array_equal(q.absmax, GOLDEN["odd_float16/absmax"])

    @pytest.mark.parametrize(("name", "scales"), [("weight", "SCB"), ("a.weight", "a.SCB"), ("w", "w.SCB")])
    def test_names(self, name, scales):
        q = qj.quantize(jnp.ones((2, 3)), "int8")
        tensors = qj.to_bitsandbytes(q, name)
        assert set(tensors) == {name, scales, scales.replace("SCB", "weight_format")}
        np.testing.assert_array_equal(qj.from_bitsandbytes(tensors, name).codes, q.codes)
        if name != "w":
            assert part_of(scales) == name

    @pytest.mark.parametrize(
        ("part", "value", "message"),
        [
            ("a.b.SCB", None, "a.b.SCB is missing"),
            ("a.b.SCB", np.ones(32, np.float32), "float32 with 32 values; expected float32 with 33"),
            ("a.b.SCB", np.full(33, np.nan, np.float32), "holds NaN"),
            ("a.b.SCB", -np.ones(33, np.float32), "negative"),
            ("a.b.weight", np.ones((33, 7), np.uint8), r"a.b.weight is uint8 \[33, 7\]; expected int8"),
            ("a.b.weight_format", np.asarray(2, np.uint8), "weight_format is 2"),
        ],
    )
    def test_what_cannot_be(self, part, value, message):
        tensors = self.tensors()
        del tensors[part]
        with pytest.raises(qj.InputError, match=message):
            int8.from_file(tensors | ({} if value is None else {part: value}), "a.b.weight")
