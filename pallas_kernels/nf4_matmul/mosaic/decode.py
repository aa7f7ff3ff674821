"""Decoding inside Mosaic GPU kernels: one nibble of every byte of a tile, looked up, scaled and rounded.

A kernel may not close over an array, so a table is constants of its program. Two ways to look values up:

permutes: four bytes of codes in a register become four 16-bit values by byte permutes in inline PTX, 4 instructions a
weight (a select tree compiles to 14 or so). What a GPU runs.
selects: a tree of selects in plain JAX. What Mosaic's interpreter runs, which has no inline PTX; the same values.

Table entries are rounded to 16 bits before they meet the scale, as in triton/decode.py.
"""

from collections.abc import Sequence

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

LAYOUT = plgpu.Layout.WGMMA_UPCAST_2X  # a thread's registers hold four neighbours of one row


def decode(
    codes: jax.Array, shift: jax.Array | int, scales: jax.Array, table: Sequence[float], dtype, permutes: bool
) -> jax.Array:
    """[rows, columns] in dtype: table[nibble], rounded to dtype, times the scale, rounded to dtype.

    Args:
      codes: uint8 [rows, columns].
      shift: 0 for the low nibbles, 4 for the high ones; may be traced.
      scales: float32 [rows], one scale for a row of the tile.
      table: 16 values.
      dtype: bfloat16 or float16.
      permutes: look up by inline PTX (inside a kernel only), else by selects.
    """
    values = (look_up_by_permutes if permutes else look_up_by_selects)(codes, shift, table, dtype)
    return (values.astype(jnp.float32) * jax.lax.broadcast_in_dim(scales, codes.shape, (0,))).astype(dtype)


def look_up_by_selects(codes: jax.Array, shift: jax.Array | int, table: Sequence[float], dtype) -> jax.Array:
    """table[nibble] in dtype: 15 selects of constants."""
    nibbles = codes.astype(jnp.int32) >> shift
    level = [jnp.asarray(value, dtype) for value in table]
    for bit in range(4):
        is_set = (nibbles & (1 << bit)) != 0
        level = [jnp.where(is_set, odd, even) for even, odd in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def look_up_by_permutes(codes: jax.Array, shift: jax.Array | int, table: Sequence[float], dtype) -> jax.Array:
    """table[nibble] in dtype, by `assembly` on each register of the tile."""
    text = assembly(table, dtype)
    result_type = plgpu.ShapeDtypeStruct(codes.shape, dtype, layout=LAYOUT)

    @plgpu.inline_mgpu(arg_types=(LAYOUT, plgpu.Layout.WG_SPLAT(())), return_type=result_type)
    def look_up(_, tile, shift):
        i32 = ir.IntegerType.get_signless(32)
        pair = llvm.StructType.get_literal([i32, i32])
        values = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)))
        amount = shift.registers.item()
        registers = np.empty_like(tile.registers)
        for index, register in np.ndenumerate(tile.registers):
            word = mgpu.utils.bitcast(register, i32)
            found = llvm.inline_asm(pair, [word, amount], text, "=r,=r,r,r")
            halves = [llvm.extractvalue(i32, found, [half]) for half in range(2)]
            registers[index] = mgpu.utils.vector_concat([mgpu.utils.bitcast(half, values) for half in halves])
        return mgpu.FragmentedArray(_registers=registers, _layout=tile.layout, _is_signed=None)

    return look_up(codes, jnp.asarray(shift, jnp.int32))


def assembly(table: Sequence[float], dtype) -> str:
    """PTX: $2 four bytes of codes, $3 the shift to their nibbles -> $0 values 0 and 1, $1 values 2 and 3.

    A selector of PRMT is four nibbles that name bytes 0..7 of two registers: the codes, side by side and without their
    top bits, look themselves up in either half of the table; their top bits then choose between the two.
    """
    lines = [f"mov.b32 table{k}, {word:#010x};" for k, word in enumerate(table_words(table, dtype))]
    lines += [
        "shr.u32 code, $2, $3;",
        "and.b32 code, code, 0x0f0f0f0f;",
        "shr.u32 top, code, 4;",
        "lop3.b32 code, code, top, 0, 0xfc;",  # code | top: bytes 0 and 2 now hold two codes each
        "prmt.b32 code, code, code, 0x2020;",
        "shr.u32 top, code, 1;",
        "lop3.b32 top, top, 0x44444444, 0x32103210, 0xea;",  # (top & 0x4444..) | 0x3210..
        "and.b32 code, code, 0x77777777;",
    ]
    for plane, register in enumerate(("low", "high")):  # of the values' bytes
        words = [f"table{4 * plane + k}" for k in range(4)]
        lines += [
            f"prmt.b32 first, {words[0]}, {words[1]}, code;",
            f"prmt.b32 last, {words[2]}, {words[3]}, code;",
            f"prmt.b32 {register}, first, last, top;",
        ]
    lines += ["prmt.b32 $0, low, high, 0x5140;", "prmt.b32 $1, low, high, 0x7362;"]
    registers = ".reg .b32 code, top, first, last, low, high, table<8>;"
    return "\n".join(["{", registers, *lines, "}"])


def table_words(table: Sequence[float], dtype) -> list[int]:
    """Eight 32-bit words: the low bytes of the 16 entries in dtype, then their high bytes, four to a word."""
    entries = np.asarray(table, np.float32).astype(jnp.dtype(dtype))
    return [int(word) for word in np.ascontiguousarray(entries.view(np.uint8).reshape(16, 2).T).view("<u4").ravel()]


def scale_planes(absmax: jax.Array, shape: tuple[int, int], block_size: int) -> jax.Array:
    """absmax float32 [O * C] -> [2 * C, O / 2]: row 2 c + h holds block c of the rows of half h.

    The scales of a tile's rows then lie side by side, as bulk copies into shared memory want them.
    """
    out_features, in_features = shape
    blocks = in_features // block_size
    return absmax.reshape(2, out_features // 2, blocks).transpose(2, 0, 1).reshape(2 * blocks, out_features // 2)
