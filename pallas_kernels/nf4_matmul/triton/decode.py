"""4-bit codes to 16-bit values in registers by byte permutes: 2 PRMT a weight, no memory access.

PRMT picks four bytes out of two 32-bit registers; each of the four low nibbles of its selector names a byte 0..7. So
four 4-bit codes, masked by 0x7, are a selector as they stand: one PRMT looks them up in the table's first eight
entries, one in the last eight, and a third chooses between the two by the codes' top bits. A table entry has two bytes
(bfloat16 or float16), looked up apart and put together by two more PRMT. A 32-bit word is four bytes of codes; with the
half-planar layout (reference.py) its low nibbles are four neighbours of one row of W, its high nibbles the same columns
O / 2 rows on.

The table is read once into eight registers: any 16 values, one program for all tables. Entries are rounded to 16 bits
before they meet the scale (bitsandbytes' fused kernel does the same): relative error 2^-9 for bfloat16, 2^-12 for
float16, on top of the rounding of the product.
"""

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import triton
import triton.language as tl

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

# outputs: pairs of low nibbles 0-1 and 2-3, pairs of high nibbles 0-1 and 2-3
# inputs: four bytes of codes; the table's eight words, each four times (for every element of a pack the same register)
_CONSTRAINTS = ",".join(["=r"] * 4 + ["r"] * (1 + 8 * 4))


def _assembly() -> str:
    """PTX that turns one word of codes into eight values; outputs come last, they may share inputs' registers."""
    lines = [
        ".reg .b32 code, top, first, last, low0, high0, low1, high1;",
        "and.b32 code, $4, 0x77777777;",
        "shr.u32 top, $4, 1;",
        "lop3.b32 top, top, 0x44444444, 0x32103210, 0xea;",  # (top & 0x4444..) | 0x3210..
    ]
    for half in range(2):
        if half:
            lines += ["shr.u32 code, code, 16;", "shr.u32 top, top, 16;"]
        for plane, register in enumerate(("low", "high")):
            words = [5 + 4 * (4 * plane + word) for word in range(4)]
            lines += [
                f"prmt.b32 first, ${words[0]}, ${words[1]}, code;",
                f"prmt.b32 last, ${words[2]}, ${words[3]}, code;",
                f"prmt.b32 {register}{half}, first, last, top;",
            ]
    for half in range(2):
        # codes came as low 0, high 0, low 1, high 1: bytes 0 and 2 are the low nibbles', 1 and 3 the high ones'
        lines += [
            f"prmt.b32 ${half}, low{half}, high{half}, 0x6240;",
            f"prmt.b32 ${half + 2}, low{half}, high{half}, 0x7351;",
        ]
    return "\n".join(["{", *lines, "}"])


ASSEMBLY = tl.constexpr(_assembly())
CONSTRAINTS = tl.constexpr(_CONSTRAINTS)
PIN = tl.constexpr("mov.b32 $0, $1;")


def table_words(table: Sequence[float], dtype: str) -> np.ndarray:
    """uint32 [8]: the low bytes of the 16 entries, then their high bytes, four to a word.

    Args:
      table: 16 values.
      dtype: "bfloat16" or "float16", what they are rounded to.
    """
    if len(table) != 16:
        raise ValueError(f"a 4-bit table has 16 values, found {len(table)}")
    entries = np.asarray(table, np.float32).astype(DTYPES[dtype])
    return np.ascontiguousarray(entries.view(np.uint8).reshape(16, 2).T).reshape(32).view(np.uint32)


@triton.jit
def load_table(table):
    """The table's eight words, held in registers: as constants they would be moved to a register before each use."""
    return (
        tl.load(table),
        tl.load(table + 1),
        tl.load(table + 2),
        tl.load(table + 3),
        tl.load(table + 4),
        tl.load(table + 5),
        tl.load(table + 6),
        tl.load(table + 7),
    )


@triton.jit
def decode(codes, words, DTYPE: tl.constexpr):
    """uint8 tile -> (tile of rows o, tile of rows o + O / 2), unscaled, in DTYPE."""
    w0, w1, w2, w3, w4, w5, w6, w7 = words
    return tl.inline_asm_elementwise(
        ASSEMBLY,
        CONSTRAINTS,
        [codes, w0, w1, w2, w3, w4, w5, w6, w7],
        dtype=(DTYPE.value, DTYPE.value),
        is_pure=True,
        pack=4,
    )


@triton.jit
def pin(weights, DTYPE: tl.constexpr):
    """The same tile. No instruction comes of it, but the compiler may not move it.

    Left alone, Triton moves decoding behind the exchange through shared memory into the tensor cores' layout, where
    each of the warps that share the rows decodes them again (8 times 2 PRMT a weight at 8 warps on sm_86).
    """
    return tl.inline_asm_elementwise(PIN, "=r,r", [weights], dtype=DTYPE.value, is_pure=False, pack=2)


@triton.jit
def load_scales(index, absmax, scale_map, nested_absmax, offset):
    """Scales of the blocks at `index`, float32; expanded from 8 bits where there is a scale_map (else it is None)."""
    stored = tl.load(absmax + index)
    if scale_map is None:
        scale = stored
    else:
        scale = tl.load(scale_map + stored.to(tl.int32)) * tl.load(nested_absmax + index // 256) + tl.load(offset)
    return scale
