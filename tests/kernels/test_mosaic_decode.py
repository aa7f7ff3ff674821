"""Looking codes up in the Mosaic kernels' tables: the PTX that the GPU gets, and what the interpreter runs."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nf4_matmul.mosaic.decode import assembly, look_up_by_selects
from tests.kernels import ptx

DTYPES = [jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize("shift", [0, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_assembly_looks_up_what_the_selects_do(dtype, shift):
    """The PTX that the GPU gets, emulated on every byte in every place of a word, under a random table."""
    rng = np.random.default_rng(0)
    table = tuple(float(value) for value in rng.normal(size=16))
    codes = np.stack([np.roll(rng.permutation(256), place) for place in range(4)], axis=1).astype(np.uint8)
    words = codes.view("<u4")[:, 0]
    found = ptx.run(assembly(table, dtype), [words, np.uint32(shift)], outputs=2)
    values = np.stack(found, axis=1).astype("<u4").view(jnp.dtype(dtype))
    expected = look_up_by_selects(jnp.asarray(codes), shift, table, dtype)
    np.testing.assert_array_equal(values.view(np.uint16), np.asarray(expected).view(np.uint16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_selects_look_up_the_rounded_table(dtype):
    table = tuple(float(value) for value in np.random.default_rng(0).normal(size=16))
    codes = np.arange(256, dtype=np.uint8).reshape(4, 64)
    for half in range(2):
        expected = np.asarray(table, np.float32).astype(dtype)[codes >> 4 * half & 15]
        found = look_up_by_selects(jnp.asarray(codes), 4 * half, table, dtype)
        np.testing.assert_array_equal(np.asarray(found), expected)
