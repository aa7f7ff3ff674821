"""Residuals against decompositions written out, for every shape and form of a weight."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qlora_jax.errors import InputError
from qlora_jax.quant.tensor import dequantize, quantize
from qlora_jax.residual import OLORA, PISSA, residual

pytestmark = pytest.mark.quick_compile

SHAPES = [(64, 64), (96, 40), (40, 96), (33, 7), (7, 33), (1, 5)]


def weight(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def part(w, init, rank, scale):
    """What the initialisation takes, by a whole decomposition of float64 W, as peft's source has it."""
    if init == PISSA:
        u, s, v = np.linalg.svd(w, full_matrices=False)
        return u[:, :rank] * s[:rank] @ v[:rank]
    q, r = np.linalg.qr(w)
    return scale * q[:, :rank] @ r[:rank]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("init", [PISSA, OLORA])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_whole_decomposition_less_its_first_part(shape, init, dtype):
    w = weight(shape, dtype=dtype)
    for rank in {1, max(1, min(shape) // 2), min(shape)}:
        left = residual(jnp.asarray(w), init, rank, 1.5, "w")
        expected = w.astype(np.float64) - part(w.astype(np.float64), init, rank, 1.5)
        assert left.dtype == dtype and left.shape == shape
        step, smallest = float(ml_dtypes.finfo(dtype).eps), 1e-7 if dtype == np.float16 else 1e-12
        np.testing.assert_allclose(left.astype(np.float64), expected, rtol=step, atol=smallest)


def test_columns_of_zeros_are_taken_as_a_whole_qr_takes_them():
    w = weight((24, 16))
    w[:, [0, 3]], w[5] = 0, 0
    left = residual(w, OLORA, 5, 2.0, "w")
    np.testing.assert_allclose(left, w - part(w.astype(np.float64), OLORA, 5, 2.0), atol=1e-6)


@pytest.mark.parametrize(("format", "double_quant"), [("nf4", True), ("fp4", False), ("int4", True)])
def test_4_bits_are_dequantized_and_quantized_again(format, double_quant):
    q = quantize(jnp.asarray(weight((64, 96))), format, 32, double_quant)
    left = residual(q, OLORA, 4, 0.5, "w")
    assert (left.format, left.block_size, left.double_quant, left.shape) == (format, 32, double_quant, (64, 96))
    w = np.asarray(dequantize(q, jnp.float32)).astype(np.float64)
    expected = quantize(jnp.asarray((w - part(w, OLORA, 4, 0.5)).astype(np.float32)), format, 32, double_quant)
    np.testing.assert_array_equal(left.codes, expected.codes)
    np.testing.assert_allclose(dequantize(left, jnp.float32), dequantize(expected, jnp.float32), rtol=1e-5)


def test_what_cannot_be_taken_out_is_an_error():
    with pytest.raises(InputError, match='"pissa", which peft takes out of 16- or 32-bit weights alone'):
        residual(quantize(jnp.asarray(weight((64, 64)))), PISSA, 2, 1.0, "w")
    with pytest.raises(InputError, match=r"w is \[8, 4\]: olora cannot take 5 directions out of it"):
        residual(weight((8, 4)), OLORA, 5, 1.0, "w")
    for init in (PISSA, OLORA):
        for place in ((0, 0), (7, 3)):
            for value in (np.nan, np.inf):
                w = weight((8, 4))
                w[place] = value
                with pytest.raises(InputError, match="w holds NaN or inf"):
                    residual(w, init, 2, 1.0, "w")
