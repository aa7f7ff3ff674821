"""The low-rank term in the kernels' epilogue, in Triton's interpreter: exact on whole numbers, packs included."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton")

from pallas_kernels.nf4_matmul import config, dequantize  # noqa: E402
from pallas_kernels.nf4_matmul.config import Tiles  # noqa: E402
from pallas_kernels.nf4_matmul.triton.backend import LowRank  # noqa: E402
from tests.kernels import interpreter  # noqa: E402
from tests.kernels.weights import whole_numbers  # noqa: E402

PLAIN = Tiles(16, 32, 32, split=1, group_m=2, num_warps=4, num_stages=2)
FULL = replace(PLAIN, block_m=128, block_o=64, block_i=64, num_warps=2)  # 16 of the rank at once

# shape, block size, adapters, rows of each, rank, tiles
CASES = {
    "one adapter": ((64, 64), 64, 1, 16, 16, PLAIN),
    "rank 1": ((64, 64), 64, 1, 16, 1, PLAIN),
    "rank 8, ragged rows and out-features": ((90, 64), 64, 1, 37, 8, PLAIN),
    "rank 20 fills no piece": ((64, 64), 64, 1, 5, 20, PLAIN),
    "rank 64": ((64, 128), 64, 1, 16, 64, PLAIN),
    "rank 100": ((64, 64), 64, 2, 16, 100, PLAIN),
    "rank 256": ((64, 64), 64, 1, 16, 256, replace(PLAIN, scale_sums=True)),
    "sums that fill the registers": ((64, 64), 64, 2, 20, 40, FULL),
    "a pack": ((64, 64), 64, 3, 32, 16, PLAIN),
    "a pack of one row each": ((70, 128), 64, 5, 1, 8, replace(PLAIN, scale_sums=True, scales_in_kernel=True)),
    "a pack whose rows fill no tile": ((64, 64), 64, 3, 37, 8, replace(PLAIN, group_m=4)),
    "splits": ((320, 352), 32, 1, 20, 24, replace(PLAIN, split=3)),
    "a pack with splits": ((320, 352), 32, 2, 20, 8, replace(PLAIN, split=2)),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("op", config.OPS)
@pytest.mark.parametrize("case", CASES)
def test_whole_numbers_come_out_exactly(case, op, dtype):
    """No rounding but the result's: a wrong row, adapter, half or piece of the rank and this fails."""
    shape, block_size, adapters, rows, rank, tiles = CASES[case]
    packed, codec = whole_numbers(shape, block_size, True, seed=len(case))
    w = np.asarray(dequantize(packed, codec, jnp.float32))
    w = w.T if op == "forward" else w
    rng = np.random.default_rng(1)

    def whole(*dims):
        return jnp.asarray(rng.integers(-4, 5, dims), dtype)

    x, left = whole(adapters, rows, w.shape[0]), whole(adapters, rows, rank)
    right = whole(adapters, shape[0], rank) if op == "forward" else whole(adapters, rank, shape[1])
    tiles = replace(tiles, scale_sums=tiles.scale_sums and op == "forward")

    found = interpreter.matmul(op, x.reshape(-1, w.shape[0]), packed, codec, tiles, LowRank(left, right))

    term = np.einsum("amr,aor->amo" if op == "forward" else "amr,ari->ami", *_float32(left, right))
    expected = np.asarray(x, np.float32) @ w + term
    if tiles.split == 1:  # else the parts are float32
        expected = np.asarray(jnp.asarray(expected, dtype), np.float32)
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)


def _float32(*arrays):
    return [np.asarray(array, np.float32) for array in arrays]
