"""QuantizedTensor: int4 by its definition, what is refused, what is stored, what quantizing costs in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as qj
from qlora_jax.quant.blockwise import quantize_packed
from qlora_jax.quant.codebooks import codebook


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_int4_is_seven_steps_a_side():
    w = normal(6, 100)
    w[1, 5:40] = 0
    q = qj.quantize(jnp.asarray(w), "int4", 32, double_quant=False)
    blocks = np.pad(w.reshape(-1), (0, -w.size % 32)).reshape(-1, 32)
    absmax = np.abs(blocks).max(1).astype(np.float64)
    steps = np.round(7 * blocks / absmax[:, None])  # -7..7; no value lies on a threshold here
    np.testing.assert_allclose(np.asarray(q.absmax), absmax, rtol=1e-7)
    expected = (steps / 7 * absmax[:, None]).reshape(-1)[: w.size].reshape(w.shape)
    np.testing.assert_allclose(qj.dequantize(q, jnp.float32), expected, rtol=1e-6, atol=0)
    codes = np.concatenate([np.asarray(q.codes) & 15, np.asarray(q.codes) >> 4])
    assert codes.min() == 0 and codes.max() == 14


def test_int4_tie_goes_to_the_lower_value():
    w = np.zeros((1, 32), np.float32)
    w[0, :4] = [7, 0.5, -0.5, 2.5]
    q = qj.quantize(jnp.asarray(w), "int4", 32, double_quant=False)
    np.testing.assert_allclose(qj.dequantize(q, jnp.float32)[0, :5], [7, 0, -1, 2, 0], rtol=1e-6)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4", "fp4-e3m0"])
def test_error_is_at_most_half_the_widest_gap(format):
    w = normal(16, 64)
    q = qj.quantize(jnp.asarray(w), format, 64, double_quant=False)
    values = np.sort(codebook(format).values)
    error = np.abs(np.asarray(qj.dequantize(q, jnp.float32)) - w) / np.abs(w).max(1, keepdims=True)
    assert 0 < error.max() <= np.diff(values).max() / 2 + 1e-6


def test_fp4_e3m0_is_powers_of_two_and_zero():
    """As bitsandbytes' create_fp8_map(signed=True, exponent_bits=3, precision_bits=0, total_bits=4) has them."""
    powers = [2.0**-k for k in range(7)]
    assert set(codebook("fp4-e3m0").values) == {0.0, *powers, *(-p for p in powers)}
    w = np.zeros((1, 32), np.float32)
    w[0, :7] = [1, 0.76, 0.74, 0.012, 0.007, -0.4, -0.01]  # 0.75 and 1 / 128 are in the middle
    q = qj.quantize(jnp.asarray(w), "fp4-e3m0", 32, double_quant=False)
    np.testing.assert_array_equal(qj.dequantize(q, jnp.float32)[0, :8], [1, 1, 0.5, 1 / 64, 0, -0.5, -1 / 64, 0])
    assert int(np.asarray(q.codes).max() >> 4) < 15


@pytest.mark.parametrize("block_size", [0, 16, 48, 8192, -64])
def test_unknown_block_size(block_size):
    with pytest.raises(qj.InputError, match=f"block_size is {block_size}; expected a power of two"):
        qj.quantize(jnp.ones((2, 2)), block_size=block_size)


@pytest.mark.parametrize("shape", [(4,), (2, 2, 2), (0, 3)])
def test_only_matrices(shape):
    with pytest.raises(qj.InputError, match="non-empty"):
        qj.quantize(jnp.ones(shape))


def test_unknown_format_and_dtype():
    with pytest.raises(qj.InputError, match="'nf5'; known: nf4, fp4, int4"):
        qj.quantize(jnp.ones((2, 2)), "nf5")
    with pytest.raises(qj.InputError, match="int32"):
        qj.quantize(jnp.ones((2, 2), jnp.int32))


@pytest.mark.parametrize(
    ("block_size", "double_quant", "bits"),
    [
        (64, False, 4.5),
        (64, True, 4 + 8 / 64 + 32 / (64 * 256)),
        (32, False, 5.0),
        (4096, True, 4 + 8 / 4096 + 32 / (4096 * 256)),
    ],
)
def test_bits_per_param(block_size, double_quant, bits):
    q = jax.eval_shape(
        lambda w: qj.quantize(w, "nf4", block_size, double_quant), jax.ShapeDtypeStruct((1024, 4096), "f")
    )
    scalars = 8 * 4 / (1024 * 4096)  # the offset
    assert bits <= q.bits_per_param <= bits + scalars
    assert q.nbytes * 8 == pytest.approx(q.bits_per_param * 1024 * 4096)
    assert q.double_quant == double_quant


def test_stacked_layers_count_all_their_bytes():
    q = qj.quantize(jnp.asarray(normal(8, 96)))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), q, q, q)
    assert stacked.shape == q.shape == (8, 96)
    assert stacked.nbytes == 3 * q.nbytes
    assert stacked.bits_per_param == q.bits_per_param
    assert q.nbytes == 8 * 96 // 2 + 12 + 4 + 4


def test_bfloat16_weights_are_quantized_as_their_float32_values():
    w = jnp.asarray(normal(16, 80), jnp.bfloat16)
    for a, b in zip(jax.tree.leaves(qj.quantize(w)), jax.tree.leaves(qj.quantize(w.astype(jnp.float32))), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_quantizing_needs_a_few_times_the_weight_at_most(format):
    w = jax.ShapeDtypeStruct((2048, 1024), jnp.bfloat16)
    compiled = quantize_packed.lower(w, codebook(format), 64, True).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * w.size * w.dtype.itemsize
    assert memory.output_size_in_bytes < 0.6 * w.size
