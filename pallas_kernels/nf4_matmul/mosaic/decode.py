"""Looking 4-bit codes up in Mosaic GPU kernels, in a table rounded to 16 bits.

Byte permutes in PTX look up four values at a time, a nibble of the selector each: `assembly` alone, and as a part of
fragments_ptx.py. A tree of selects in plain JAX finds the same values: that is what Mosaic's interpreter runs, which
has no inline PTX.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def look_up_by_selects(codes: jax.Array, shift: int, table: Sequence[float], dtype) -> jax.Array:
    """table[nibble] in dtype, by 15 selects of constants. shift: 0 for the low nibbles of the bytes, 4 for the high."""
    nibbles = codes.astype(jnp.int32) >> shift
    level = [jnp.asarray(value, dtype) for value in table]
    for bit in range(4):
        is_set = (nibbles & (1 << bit)) != 0
        level = [jnp.where(is_set, odd, even) for even, odd in zip(level[::2], level[1::2], strict=True)]
    return level[0]


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
