"""What the Mosaic kernels share with no kernel around it: decoding a tile, and the order of scales."""

import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as qj
from pallas_kernels.nf4_matmul import dequantize
from pallas_kernels.nf4_matmul.mosaic.decode import assembly, decode, look_up_by_selects, scale_planes
from tests.kernels import ptx

DTYPES = [jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
def test_tiles_decode_to_the_dequantized_weight_of_the_rounded_table(format, dtype):
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(16, 64)), jnp.float32)
    q = qj.quantize(weight, format=format, double_quant=False)
    codes, absmax = q.packed.codes.reshape(8, 64), q.packed.absmax.reshape(2, 8)
    halves = [decode(codes, 4 * half, absmax[half], q.codec.table, dtype, permutes=False) for half in range(2)]
    found = np.asarray(jnp.concatenate(halves), np.float32)
    rounded = tuple(float(value) for value in np.asarray(q.codec.table, np.float32).astype(jnp.dtype(dtype)))
    expected = dequantize(q.packed, q.codec._replace(table=rounded), dtype)
    np.testing.assert_array_equal(found, np.asarray(expected, np.float32))


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


def test_scales_of_a_tile_lie_side_by_side():
    out_features, blocks = 6, 4
    planes = scale_planes(jnp.arange(out_features * blocks), (out_features, blocks * 64), 64)
    assert planes.shape == (2 * blocks, 3)
    for row in range(out_features):
        for block in range(blocks):
            assert planes[2 * block + row // 3, row % 3] == row * blocks + block
