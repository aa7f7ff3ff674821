"""Which weight is where: what the Hopper kernels for training decode into registers, thread by thread.

The texts are run on a tile as a bulk copy leaves it in shared memory, and their registers are taken as PTX documents
the left operand of wgmma. Where its sums go is test_mosaic_hopper_compile.py's.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nf4_matmul import Codec, config
from pallas_kernels.nf4_matmul.mosaic import hopper
from pallas_kernels.nf4_matmul.mosaic.decode import table_words
from pallas_kernels.nf4_matmul.mosaic.fragments_ptx import OUTPUTS, backward_text, forward_text
from tests.kernels import ptx_fragments
from tests.kernels.weights import dequantized, random_weight, whole_numbers

SHAPE = (256, 512)
BYTE_ROW, COLUMN = 64, 128  # where the tile begins
TILE = {"forward": (64, 64), "backward": (32, 128)}  # byte rows and columns of a step


def decoded(op: str, packed, codec: Codec, dtype) -> np.ndarray:
    """[2 nibbles, byte rows, columns] of W: both warpgroups' operands of one step, rows named as the texts say."""
    rows, columns = TILE[op]
    codes = np.asarray(packed.codes).reshape(SHAPE[0] // 2, SHAPE[1])
    planes = np.asarray(hopper.scale_planes(packed.absmax, SHAPE, codec.block_size, dtype))
    scales = 2 * max(1, columns // codec.block_size)  # a row for either nibble of a block
    planes = planes[COLUMN // codec.block_size * 2 :][:scales, BYTE_ROW : BYTE_ROW + rows]
    text = forward_text(dtype) if op == "forward" else backward_text(dtype, 256 if scales == 4 else 0)
    tile = ptx_fragments.in_shared_memory(codes[BYTE_ROW : BYTE_ROW + rows, COLUMN : COLUMN + columns])
    shared = np.concatenate([tile, np.ascontiguousarray(planes).view(np.uint8).ravel()])
    registers = ptx_fragments.run(text, [0, tile.size, *table_words(codec.table, dtype)], OUTPUTS, shared)
    if op == "forward":  # row 16 w + 8 h + g of a warpgroup: nibble h of byte row 8 w + g
        named = ptx_fragments.operand(registers, dtype).reshape(2, 4, 2, 8, columns)
        return named.transpose(2, 0, 1, 3, 4).reshape(2, rows, columns)
    nibbles = [ptx_fragments.operand(part, dtype) for part in np.split(registers, 2)]
    # row 16 w + 8 h + g of a warpgroup: column 16 w + 2 g + h
    return np.stack([one.reshape(2, 4, 2, 8, rows).transpose(4, 0, 1, 3, 2).reshape(rows, columns) for one in nibbles])


def expected(op: str, packed, codec: Codec) -> np.ndarray:
    """The same of the dequantized weight, in float32."""
    rows, columns = TILE[op]
    halves = dequantized(packed, codec).reshape(2, SHAPE[0] // 2, SHAPE[1])
    return halves[:, BYTE_ROW : BYTE_ROW + rows, COLUMN : COLUMN + columns]


@pytest.mark.parametrize("op", config.OPS)
@pytest.mark.parametrize(("block_size", "dtype"), [(64, jnp.bfloat16), (64, jnp.float16), (256, jnp.bfloat16)])
def test_codes_and_scales_meet_in_the_registers(op, block_size, dtype):
    """Whole numbers: no rounding, so one wrong place of a nibble, a scale, a row or a column and this fails."""
    packed, codec = whole_numbers(SHAPE, block_size, False, seed=block_size)
    found = decoded(op, packed, codec, dtype).astype(np.float32)
    np.testing.assert_array_equal(found, expected(op, packed, codec))


@pytest.mark.parametrize("op", config.OPS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_weight_is_rounded_all_but_once(op, dtype):
    """The rounded table times the scale: half a unit in the last place, 2^-7 units, and float16's smallest steps."""
    packed, codec = random_weight(SHAPE, double_quant=False)
    packed = packed._replace(absmax=packed.absmax / 32)
    table = tuple(float(value) for value in np.asarray(codec.table, np.float32).astype(dtype))
    exact = expected(op, packed, codec._replace(table=table))
    found = decoded(op, packed, codec, dtype)
    bits, smallest = (8, 0) if dtype == jnp.bfloat16 else (11, 2.0**-24)
    unit = np.exp2(np.frexp(exact)[1] - bits)
    assert np.all(np.abs(found.astype(np.float64) - exact) <= (0.5 + 2.0**-7) * unit + smallest)
    assert np.mean(found != exact.astype(dtype)) < 0.02


def test_scales_of_a_tile_lie_side_by_side_each_a_sum_of_two():
    out_features, blocks = 8, 4
    absmax = jnp.asarray(np.random.default_rng(0).uniform(0.01, 4, out_features * blocks), jnp.float32)
    for dtype, tail, smallest in ((jnp.bfloat16, 2.0**-17, 0), (jnp.float16, 2.0**-23, 2.0**-25)):
        planes = np.asarray(hopper.scale_planes(absmax, (out_features, blocks * 64), 64, dtype))
        assert planes.shape == (2 * blocks, 4)
        parts = planes.view(dtype).reshape(2 * blocks, 2, 2, 2).astype(np.float64)  # [., two rows, hi or lo, row]
        found = parts.sum(2).reshape(blocks, 2, 4).transpose(1, 2, 0).reshape(-1)
        np.testing.assert_allclose(found, np.asarray(absmax, np.float64), rtol=tail, atol=smallest)
