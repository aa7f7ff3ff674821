"""The Triton kernels, assembly included, in Triton's interpreter against the dequantized weight."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton")


import qlora_jax as qj  # noqa: E402
from pallas_kernels.nf4_matmul import config, dequantize  # noqa: E402
from pallas_kernels.nf4_matmul.config import Tiles  # noqa: E402
from tests.kernels import interpreter  # noqa: E402
from tests.kernels.weights import whole_numbers

PLAIN = Tiles(16, 32, 32, split=1, group_m=2, num_warps=4, num_stages=2)
UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


# shape, block size, whether scales are nested, rows, tiles
CASES = {
    "whole tiles": ((64, 64), 64, False, 16, PLAIN),
    "rows and out-features that fill no tile": ((90, 64), 64, True, 37, PLAIN),
    "one row": ((64, 128), 64, True, 1, PLAIN),
    "few rows": ((70, 128), 64, True, 3, replace(PLAIN, scale_sums=True, scales_in_kernel=True)),
    "several nested blocks": ((600, 64), 64, True, 3, replace(PLAIN, block_o=64, scales_in_kernel=True)),
    "plain scales of sums": ((64, 128), 64, False, 5, replace(PLAIN, scale_sums=True)),
    "split that does not divide the sum": ((320, 352), 32, True, 20, replace(PLAIN, split=3)),
    "blocks of 32": ((64, 96), 32, True, 20, PLAIN),
    "two tiles in a block": ((64, 256), 128, True, 20, replace(PLAIN, block_i=64)),
    "a tile as wide as a block of 128": ((64, 256), 128, True, 20, replace(PLAIN, block_i=128)),
    "groups of rows": ((130, 128), 64, True, 70, replace(PLAIN, group_m=3)),
}


@pytest.mark.parametrize("op", config.OPS)
@pytest.mark.parametrize("case", CASES)
def test_whole_numbers_come_out_exactly(case, op):
    """No rounding but the result's: one wrong index of codes, scales, x or y and this fails."""
    shape, block_size, nested, rows, tiles = CASES[case]
    packed, codec = whole_numbers(shape, block_size, nested, seed=len(case))
    w = np.asarray(dequantize(packed, codec, jnp.float32))
    w = w.T if op == "forward" else w
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.integers(-4, 5, (rows, w.shape[0])), jnp.bfloat16)

    found = interpreter.matmul(op, x, packed, codec, replace(tiles, scale_sums=tiles.scale_sums and op == "forward"))

    expected = np.asarray(x, np.float32) @ w
    if tiles.split == 1:  # else the parts are float32
        expected = np.asarray(jnp.asarray(expected, jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
@pytest.mark.parametrize("tiles", [PLAIN, replace(PLAIN, scale_sums=True, scales_in_kernel=True)], ids=["", "sums"])
@pytest.mark.parametrize("op", config.OPS)
@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
def test_rounding_stays_within_two_units(format, op, tiles, dtype):
    rng = np.random.default_rng(0)
    q = qj.quantize(jnp.asarray(rng.normal(size=(64, 128)), jnp.float32), format=format)
    w = np.asarray(qj.dequantize(q, jnp.float32), np.float64)
    w = w.T if op == "forward" else w
    x = jnp.asarray(rng.normal(size=(16, w.shape[0])), dtype)
    x_exact = np.asarray(x, np.float64)
    exact = x_exact @ w

    found = interpreter.matmul(
        op, x, q.packed, q.codec, replace(tiles, scale_sums=tiles.scale_sums and op == "forward")
    )

    # the table's entry and its product with the scale are rounded once each, the result once
    unit = UNIT_ROUNDOFF[dtype] / 2
    assert np.all(np.abs(found - exact) <= unit * (2.02 * np.abs(x_exact) @ np.abs(w) + np.abs(exact)))
    typical = unit * np.sqrt(2 * x_exact**2 @ w**2 + exact**2)  # errors are independent
    assert np.sqrt(np.mean((found - exact) ** 2)) < np.sqrt(np.mean(typical**2))
