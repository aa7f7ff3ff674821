"""The Triton kernel for few rows, assembly included, in Triton's interpreter against the dequantized weight."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton")


from pallas_kernels.nf4_matmul.config import Tiles  # noqa: E402
from pallas_kernels.nf4_matmul.triton import few_rows  # noqa: E402
from tests.kernels import interpreter  # noqa: E402
from tests.kernels.weights import dequantized, random_weight, whole_numbers  # noqa: E402

PLAIN = Tiles(block_o=32, block_i=32, split=1, num_warps=4, num_stages=2)
UNIT_ROUNDOFF = {"bfloat16": 2.0**-9, "float16": 2.0**-12}


# shape, block size, whether scales are nested, rows, tiles
CASES = {
    "whole tiles": ((64, 64), 64, False, 16, PLAIN),
    "rows and out-features that fill no tile": ((90, 64), 64, True, 11, PLAIN),
    "one row": ((64, 128), 64, True, 1, PLAIN),
    "several nested blocks": ((600, 64), 64, True, 3, replace(PLAIN, block_o=64)),
    "parts of two sizes": ((320, 352), 32, True, 13, replace(PLAIN, split=4)),
    "more parts than tiles": ((64, 96), 32, False, 2, replace(PLAIN, split=8)),
    "parts with several tiles in a block": ((64, 768), 256, True, 4, replace(PLAIN, split=2, block_i=64)),
    "blocks of 32": ((64, 96), 32, True, 5, PLAIN),
    "two tiles in a block": ((64, 256), 128, True, 16, replace(PLAIN, block_i=64)),
    "a tile as wide as a block of 128": ((64, 256), 128, True, 7, replace(PLAIN, block_i=128)),
}


@pytest.mark.parametrize("case", CASES)
def test_whole_numbers_come_out_exactly(case):
    """No rounding but the result's: one wrong index of codes, scales, x or y and this fails."""
    shape, block_size, nested, rows, tiles = CASES[case]
    packed, codec = whole_numbers(shape, block_size, nested, seed=len(case))
    w = dequantized(packed, codec)
    x = jnp.asarray(np.random.default_rng(1).integers(-4, 5, (rows, shape[1])), jnp.bfloat16)

    found = interpreter.matmul(x, [packed], [codec], tiles)

    expected = np.asarray(jnp.asarray(np.asarray(x, np.float32) @ w.T, jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("outs", "nested"), [((90, 40, 64), True), ((64, 64), True), ((64, 40), False)], ids=["qkv", "gate up", "plain"]
)
def test_several_weights_in_one_launch(outs, nested):
    """Every program takes the pointers and places of its own weight, and stores within it."""
    made = [whole_numbers((out, 128), 64, nested, seed) for seed, out in enumerate(outs)]
    weights = [(one, made[0][1]._replace(shape=codec.shape)) for one, codec in made]
    packed, codecs = zip(*weights, strict=True)
    assert few_rows.may_join(packed, codecs) and not few_rows.may_join(packed[:1] * 4, codecs[:1] * 4)
    x = jnp.asarray(np.random.default_rng(1).integers(-4, 5, (3, 128)), jnp.bfloat16)

    found = interpreter.matmul(x, packed, codecs, replace(PLAIN, block_o=16, split=2))

    expected = np.concatenate([np.asarray(x, np.float32) @ dequantized(*weight).T for weight in weights], axis=1)
    np.testing.assert_array_equal(found, np.asarray(jnp.asarray(expected, jnp.bfloat16), np.float32))


@pytest.mark.parametrize(("format", "dtype"), [("nf4", "bfloat16"), ("fp4", "float16"), ("int4", "bfloat16")])
def test_only_the_table_and_the_result_are_rounded(format, dtype):
    packed, codec = random_weight((64, 128), format=format)
    w = dequantized(packed, codec).astype(np.float64).T
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 128)), dtype)
    x_exact = np.asarray(x, np.float64)
    exact = x_exact @ w

    found = interpreter.matmul(x, [packed], [codec], PLAIN)

    unit = UNIT_ROUNDOFF[dtype]
    assert np.all(np.abs(found - exact) <= unit * (1.02 * np.abs(x_exact) @ np.abs(w) + np.abs(exact)))
    typical = unit * np.sqrt(x_exact**2 @ w**2 + exact**2)  # errors are independent
    assert np.sqrt(np.mean((found - exact) ** 2)) < np.sqrt(np.mean(typical**2))
