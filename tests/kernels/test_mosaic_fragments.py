"""Which value is where: what the Hopper kernels for training keep in registers, thread by thread.

The texts are run on a tile as a bulk copy leaves it in shared memory; their registers are taken as PTX documents the
fragments of wgmma; the sums go through the layouts by which Mosaic stores them. So codes, scales and x meet as on a
GPU, but for wgmma, the copies and Mosaic's stores themselves.
"""

import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nf4_matmul import Codec, config
from pallas_kernels.nf4_matmul.mosaic import fragments, hopper
from pallas_kernels.nf4_matmul.mosaic.decode import table_words
from pallas_kernels.nf4_matmul.mosaic.fragments_ptx import OUTPUTS, backward_text, forward_text
from tests.kernels import ptx_fragments
from tests.kernels.weights import dequantized, random_weight, whole_numbers

SHAPE, ROWS = (256, 512), 16
BYTE_ROW, COLUMN = 64, 128  # where the tile begins whose products are computed
THREAD = np.arange(256)
WARPGROUP, WARP, G, T = THREAD // 128, THREAD // 32 % 4, THREAD % 32 // 4, THREAD % 4


def in_shared_memory(tile: np.ndarray) -> np.ndarray:
    """A bulk copy's swizzle: a piece of 16 bytes is moved by the number of its 128 bytes, as CUDA's guide draws it."""
    rows, width = tile.shape
    at = np.arange(rows * width).reshape(rows, width)
    moved = np.zeros(tile.size, np.uint8)
    moved[at ^ (at // 128 % (width // 16) * 16)] = tile
    return moved


def operand(registers: np.ndarray, dtype) -> np.ndarray:
    """[2 warpgroups, 64, .] of registers uint32 [., threads]: wgmma's left operand, four registers for 16 columns."""
    values = np.ascontiguousarray(registers.T).view(dtype).reshape(256, -1, 2)
    found = np.zeros((2, 64, 4 * values.shape[1]), dtype)
    for register in range(values.shape[1]):
        row, column = 16 * WARP + G + 8 * (register % 2), 16 * (register // 4) + 8 * (register // 2 % 2) + 2 * T
        for k in range(2):
            found[WARPGROUP, row, column + k] = values[:, register, k]
    return found


def decode(op: str, packed, codec: Codec, dtype) -> list[np.ndarray]:
    """The operands of one step by the text, of both warpgroups."""
    codes = np.asarray(packed.codes).reshape(SHAPE[0] // 2, SHAPE[1])
    planes = np.asarray(hopper.scale_planes(packed.absmax, SHAPE, codec.block_size, dtype))
    planes = planes[COLUMN // codec.block_size * 2 :]
    if op == "forward":
        rows, columns, scales, text = 64, 64, 2, forward_text(dtype)
    elif codec.block_size == 64:  # each warpgroup has its own block
        rows, columns, scales, text = 32, 128, 4, backward_text(dtype, 256)
    else:
        rows, columns, scales, text = 32, 128, 2, backward_text(dtype, 0)
    tile = in_shared_memory(codes[BYTE_ROW : BYTE_ROW + rows, COLUMN : COLUMN + columns])
    scales = np.ascontiguousarray(planes[:scales, BYTE_ROW : BYTE_ROW + rows]).view(np.uint8).ravel()
    inputs = [0, tile.size, *table_words(codec.table, dtype)]
    registers = ptx_fragments.run(text, inputs, OUTPUTS, np.concatenate([tile, scales]))
    return [operand(part, dtype) for part in np.split(registers, 1 if op == "forward" else 2)]


def sums_in_registers(sums: np.ndarray) -> np.ndarray:
    """[threads, registers as the layout WGMMA has them, 2] of sums [2 warpgroups, 64, rows], by PTX's documentation."""
    found = np.zeros((256, sums.shape[2] // 8, 2, 2))
    for n, h, k in np.ndindex(found.shape[1:]):
        found[:, n, h, k] = sums[WARPGROUP, 16 * WARP + G + 8 * h, 8 * n + 2 * T + k]
    return found.reshape(256, *mgpu.WGMMA_LAYOUT.registers_shape(sums.shape[1:]), 2)


def as_layout_says(registers: np.ndarray, layout: mgpu.TiledLayout, shape: tuple[int, int]) -> np.ndarray:
    """[2 warpgroups, *shape] of registers [threads, ..., vector]: what a store by the layout makes of them."""
    found = np.full((2, *shape), np.nan)
    tiled = layout.tiling.tile_shape(shape)
    for index in np.ndindex(registers.shape[1:]):
        for thread in range(256):
            place = list(index[:-1])
            for dims, number in ((layout.warp_dims, thread // 32 % 4), (layout.lane_dims, thread % 32)):
                for dim, part in zip(dims, np.unravel_index(number, [tiled[d] for d in dims]), strict=True):
                    place[dim] = int(part)
            place[layout.vector_dim] = index[-1]
            found[thread // 128, *layout.tiling.untile_indices(tuple(place))] = registers[thread, *index]
    assert not np.isnan(found).any()
    return found


def product(op: str, operands: list[np.ndarray], x: list[np.ndarray]) -> np.ndarray:
    """What a program stores: y [rows, 2 halves, 64] or dx [rows, 128]."""
    sums = sum(w.astype(np.float64) @ part.T for w, part in zip(operands, x, strict=True))
    threads = [pairs(registers) for registers in sums_in_registers(sums)]
    if op == "forward":
        halves = []
        for half in range(2):
            mine = np.stack([unpaired(fragments.y_registers(one, half)) for one in threads])
            halves.append(as_layout_says(mine, fragments.Y_LAYOUT, (32, ROWS)))
        return np.stack(halves).transpose(3, 0, 1, 2).reshape(ROWS, 2, 64)
    part, pair = (lambda both, k: both[k]), (lambda *both: both)
    mine = np.stack([unpaired(fragments.dx_registers(one, part, pair)) for one in threads])
    return as_layout_says(mine, fragments.DX_LAYOUT, (ROWS, 64)).transpose(1, 0, 2).reshape(ROWS, 128)


def pairs(registers: np.ndarray) -> np.ndarray:
    """A thread's registers as objects, which the kernels' code moves about as it does those of MLIR."""
    found = np.empty(registers.shape[:-1], dtype=object)
    for index in np.ndindex(found.shape):
        found[index] = registers[index]
    return found


def unpaired(registers: np.ndarray) -> np.ndarray:
    return np.array([list(one) for one in registers.flat]).reshape(*registers.shape, 2)


def tiles(op: str, w: np.ndarray) -> np.ndarray:
    """Of W [O, I]: what a program decodes in one step of the rows of either half."""
    width = {"forward": 64, "backward": 128}[op]
    rows = BYTE_ROW + np.arange({"forward": 64, "backward": 32}[op])
    return np.stack([w[side * SHAPE[0] // 2 + rows, COLUMN : COLUMN + width] for side in range(2)])


@pytest.mark.parametrize("op", config.OPS)
@pytest.mark.parametrize(("block_size", "dtype"), [(64, jnp.bfloat16), (64, jnp.float16), (256, jnp.bfloat16)])
def test_codes_scales_and_rows_meet_in_the_registers(op, block_size, dtype):
    """Whole numbers: no rounding, so one wrong place of a nibble, a scale, a column or a sum and this fails."""
    packed, codec = whole_numbers(SHAPE, block_size, False, seed=block_size)
    low, high = tiles(op, dequantized(packed, codec).astype(np.float64))
    x = np.random.default_rng(1).integers(-4, 5, (2, ROWS, 64 if op == "forward" else 32)).astype(np.float64)
    if op == "forward":
        x, expected = x[:1], np.stack([x[0] @ low.T, x[0] @ high.T], axis=1)
    else:
        expected = x[0] @ low + x[1] @ high
    np.testing.assert_array_equal(product(op, decode(op, packed, codec, dtype), list(x)), expected)


@pytest.mark.parametrize("op", config.OPS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_weight_is_rounded_all_but_once(op, dtype):
    """The rounded table times the scale: half a unit in the last place, 2^-7 units, and float16's smallest steps."""
    packed, codec = random_weight(SHAPE, double_quant=False)
    packed = packed._replace(absmax=packed.absmax / 32)
    table = tuple(float(value) for value in np.asarray(codec.table, np.float32).astype(dtype))
    exact = tiles(op, dequantized(packed, codec._replace(table=table)).astype(np.float64))
    if op == "forward":
        (found,) = decode(op, packed, codec, dtype)
        found = found.reshape(2, 4, 2, 8, 64).transpose(2, 0, 1, 3, 4).reshape(exact.shape)
    else:
        both = [one.reshape(2, 4, 2, 8, 32).transpose(4, 0, 1, 3, 2) for one in decode(op, packed, codec, dtype)]
        found = np.stack([one.reshape(exact.shape[1:]) for one in both])
    bits, smallest = (8, 0) if dtype == jnp.bfloat16 else (11, 2.0**-24)
    unit = np.exp2(np.frexp(exact)[1] - bits)
    assert np.all(np.abs(found.astype(np.float64) - exact) <= (0.5 + 2.0**-7) * unit + smallest)
    assert np.mean(found != exact.astype(np.float32).astype(dtype)) < 0.02


def test_scales_of_a_tile_lie_side_by_side_each_a_sum_of_two():
    out_features, blocks = 8, 4
    absmax = jnp.asarray(np.random.default_rng(0).uniform(0.01, 4, out_features * blocks), jnp.float32)
    for dtype, tail, smallest in ((jnp.bfloat16, 2.0**-17, 0), (jnp.float16, 2.0**-23, 2.0**-25)):
        planes = np.asarray(hopper.scale_planes(absmax, (out_features, blocks * 64), 64, dtype))
        assert planes.shape == (2 * blocks, 4)
        parts = planes.view(dtype).reshape(2 * blocks, 2, 2, 2).astype(np.float64)  # [., two rows, hi or lo, row]
        found = parts.sum(2).reshape(blocks, 2, 4).transpose(1, 2, 0).reshape(-1)
        np.testing.assert_allclose(found, np.asarray(absmax, np.float64), rtol=tail, atol=smallest)


def test_the_layout_of_sums_is_the_documented_one():
    """Mosaic's layout WGMMA says of registers what PTX's documentation does, which the tests above go by."""
    sums = np.arange(2 * 64 * ROWS).reshape(2, 64, ROWS)
    np.testing.assert_array_equal(as_layout_says(sums_in_registers(sums), mgpu.WGMMA_LAYOUT, (64, ROWS)), sums)
