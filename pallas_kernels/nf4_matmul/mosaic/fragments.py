"""wgmma's register operand and its sums as arrays of Mosaic GPU, whatever rows and columns their registers stand for.

Mosaic's layout WGMMA names a register's row and column; in these kernels some stand for others (fragments_ptx.py).
Mosaic sees the order of WGMMA from the operand to the sums, and the true one where sums are stored.

Its interpreter has no inline PTX and no registers: there the operand is computed by `weights`, all in true order.
"""

from collections.abc import Sequence

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.nf4_matmul.mosaic.decode import look_up_by_selects
from pallas_kernels.nf4_matmul.mosaic.fragments_ptx import OUTPUTS

WGMMA = plgpu.Layout.WGMMA
# of 32 columns of y, 8 rows at a time, on their side: warps take 8 columns, lanes a column and two rows
Y_LAYOUT = mgpu.TiledLayout(Tiling(((32, 8), (8, 8), (2,))), (-5,), (-3, -2), -1)
# of 64 columns of dx, 8 rows at a time: warps take 16 columns, lanes two columns and two rows, a register of each row
DX_LAYOUT = mgpu.TiledLayout(
    Tiling(((8, 64), (8, 16), (2, 2), (1, 2))), (-7,), (-5, -6), -1, _check_canonical=False
).canonicalize()


def swizzle(dtype, columns: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """The order in shared memory of tiles 8 rows high and so many columns wide, at most 128 bytes."""
    width = columns * jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(width)  # type: ignore[abstract]


def operands(text: str, shape: tuple[int, int], codes, scales, table: Sequence[jax.Array], dtype) -> list[jax.Array]:
    """What a text of fragments_ptx.py writes: one operand or several of the shape, in dtype.

    Args:
      codes, scales: tiles in shared memory, the codes' with a swizzle as wide as they are.
      table: int32 [], the eight words of decode.table_words.
    """
    count = 2 * OUTPUTS * 128 // (shape[0] * shape[1])
    codes_type = plgpu.RefType(swizzle(jnp.uint8, codes.shape[1]))
    word_types = [plgpu.Layout.WG_SPLAT(())] * len(table)

    @plgpu.inline_mgpu(
        arg_types=(codes_type, plgpu.RefType(), *word_types),
        return_type=[plgpu.ShapeDtypeStruct(shape, dtype, layout=WGMMA)] * count,
    )
    def run(_, codes, scales, *table):
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)))
        inputs = [llvm.ptrtoint(i32, mgpu.utils.memref_ptr(ref)) for ref in (codes, scales)]
        inputs += [word.registers.item() for word in table]
        types = [i32] * OUTPUTS
        found = mgpu.utils.inline_ptx(text, *inputs, result_types=types, has_side_effects=True, convergent=True)
        registers = np.array([mgpu.utils.bitcast(word, pair) for word in found], dtype=object)
        registers = registers.reshape(count, *mgpu.WGMMA_LAYOUT.registers_shape(shape))
        return [mgpu.FragmentedArray(_registers=one, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None) for one in registers]

    return run(codes, scales, *table)


def weights(codes: jax.Array, nibble: int, scales: jax.Array, table: Sequence[float], dtype) -> jax.Array:
    """What a text's values are, but for their last roundings: table[nibble] in dtype, times the scale, in dtype.

    Args:
      codes: uint8 [rows, columns].
      nibble: 0 for the low ones, 1 for the high ones.
      scales: uint32 [rows], as hopper.scale_planes has them.
    """
    parts = jax.lax.bitcast_convert_type(scales, dtype).astype(jnp.float32).reshape(-1, 2, 2)  # of two rows: hi, lo
    values = look_up_by_selects(codes, 4 * nibble, table, dtype).astype(jnp.float32)
    return (values * parts.sum(1).reshape(-1, 1)).astype(dtype)


def store_y(sums: jax.Array, staging) -> None:
    """sums [64, rows] of dtype in registers -> staging [2, rows, 32]: rows of y from either half of W."""

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType(swizzle(staging.dtype, 32))), return_type=())
    def store(_, sums, staging):
        shape = Y_LAYOUT.registers_shape((32, sums.shape[1]))
        for half in range(2):
            registers = sums.registers[:, :, :, :, half].reshape(shape)
            values = mgpu.FragmentedArray(_registers=registers, _layout=Y_LAYOUT, _is_signed=None)
            values.store_tiled(mgpu.memref_transpose(mgpu.memref_slice(staging, half), (1, 0, 3, 2)), swizzle=64)
        return ()

    store(sums, staging)


def store_dx(sums: jax.Array, staging) -> None:
    """sums [64, rows], float32 in registers -> staging [rows, 64]: rows of dx."""
    dtype = staging.dtype

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType(swizzle(dtype, 64))), return_type=())
    def store(_, sums, staging):
        groups = sums.shape[1] // 8
        both = sums.registers.reshape(groups, 2)  # a lane's two rows of sums are neighbours in a row of dx
        registers = np.empty((groups, 2), dtype=object)
        for group, row in np.ndindex(groups, 2):
            pair = [mgpu.utils.vector_slice(register, slice(row, row + 1)) for register in both[group]]
            registers[group, row] = mgpu.utils.vector_concat(pair)
        registers = registers.reshape(DX_LAYOUT.registers_shape((8 * groups, 64)))
        values = mgpu.FragmentedArray(_registers=registers, _layout=DX_LAYOUT, _is_signed=None)
        values.astype(mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype))).store_tiled(staging, swizzle=128)
        return ()

    store(sums, staging)
