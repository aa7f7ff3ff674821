"""PTX of the Hopper kernels for training: from packed bytes in shared memory to a register operand of wgmma.

Lane 4 g + t of warp w holds, of wgmma's left operand [64, 16], rows 16 w + g and 16 w + g + 8, of each the columns 2 t,
2 t + 1, 2 t + 8 and 2 t + 9, in four registers of two neighbours. Which row of W a row stands for is free, as long as
sums are stored by it: so rows are named such that a lane loads the codes of its own fragment, and no value moves.

forward: the operand is W [64, 64]. Rows 16 w + g and 16 w + g + 8 are the low and the high nibbles of byte row 8 w + g:
two neighbouring bytes are a register of either.

backward: the operands are W^T [64, 32], one of each nibble. A register's neighbours are two byte rows of a column.
ldmatrix.trans gives a lane two byte rows of columns 2 g and 2 g + 1 of 16: these are rows 16 w + g and 16 w + g + 8.

Four nibbles in 16 bits, low, high, low, high, are a byte permute's selector: three permutes look up the low bytes of
four values, three the high bytes, and one for either nibble makes a register. With the selectors that is 11
instructions for four values. Table entries are rounded to 16 bits before they meet the scale, as in triton/decode.py.

A scale is the sum of two 16-bit numbers. A multiplication and a multiply-add scale two values: within 2^-7 units of the
last place (in float16 also within 2^-24) of a float32 product rounded once.

Tiles of codes lie as bulk copies with a swizzle leave them, 64 bytes a row forward and 128 backward.
"""

import jax.numpy as jnp

OUTPUTS = 16  # registers that a text writes, $0, $1, ...; then come its inputs:
CODES, SCALES = f"${OUTPUTS}", f"${OUTPUTS + 1}"  # addresses of the tiles in shared memory
TABLE = [f"${OUTPUTS + 2 + k}" for k in range(8)]  # decode.table_words


def forward_text(dtype) -> str:
    """A program's operands of one step, [64, 64] for either warpgroup, of codes [64, 64] and scales uint32 [2, 64].

    Register 2 j + h holds columns 8 j + 2 t and the next of nibble h. Scales are as hopper.scale_planes has them.
    """
    lines = [
        "mov.u32 thread, %tid.x;",
        "and.b32 row, thread, 0xfc;",  # 4 times the byte row, of both warpgroups
        "shl.b32 codes0, row, 4;",
        "shl.b32 rest, thread, 1;",
        "and.b32 first, rest, 0x06;",
        "and.b32 last, rest, 0x30;",  # the swizzle: a row's pieces of 16 bytes are numbered ^ (row / 2 % 4)
        "add.u32 codes0, codes0, first;",
        "add.u32 codes0, codes0, last;",
        *[f"xor.b32 codes{piece}, codes0, {16 * piece};" for piece in range(1, 4)],
        *[f"add.u32 codes{piece}, codes{piece}, {CODES};" for piece in range(4)],
        "and.b32 scale, thread, 0xf8;",  # 8 bytes for two rows
        "and.b32 first, thread, 4;",
        "shr.u32 first, first, 1;",
        "add.u32 scale, scale, first;",
        f"add.u32 scale, scale, {SCALES};",
        *[
            line
            for half in range(2)
            for part, offset in (("hi", 0), ("lo", 4))
            for line in (
                f"ld.shared.u16 {part}{half}, [scale+{256 * half + offset}];",
                f"prmt.b32 {part}{half}, {part}{half}, {part}{half}, 0x1010;",
            )
        ],
        *[f"ld.shared.u16 word{j}, [codes{j // 2}+{8 * (j % 2)}];" for j in range(8)],
    ]
    for j in range(8):
        lines += [*_selectors(f"word{j}"), *_pairs(f"${2 * j}", f"${2 * j + 1}", dtype, ("hi0", "lo0"), ("hi1", "lo1"))]
    return _text(lines, ["row", "codes<4>", "scale", "hi<2>", "lo<2>", "word<8>"])


def backward_text(dtype, scale_stride: int) -> str:
    """A program's operands of one step, two [64, 32] for either warpgroup, of codes [32, 128], scales uint32 [., 32].

    Register 8 * nibble + 2 j + h holds byte rows 8 j + 2 t and the next of column 2 g + h. Scales are as
    hopper.scale_planes has them, a row for a nibble.

    scale_stride: bytes from the first warpgroup's scales to the second's.
    """
    lines = [
        "mov.u32 thread, %tid.x;",
        "and.b32 codes, thread, 31;",
        "shl.b32 codes, codes, 7;",
        "shr.u32 first, thread, 5;",
        "and.b32 last, thread, 7;",
        "xor.b32 first, first, last;",  # the swizzle: a row's pieces of 16 bytes are numbered ^ (row % 8)
        "shl.b32 first, first, 4;",
        "add.u32 codes, codes, first;",
        f"add.u32 codes, codes, {CODES};",
        "and.b32 scale, thread, 3;",
        "shl.b32 scale, scale, 3;",
        "shr.u32 first, thread, 7;",
        f"mul.lo.u32 first, first, {scale_stride};",
        "add.u32 scale, scale, first;",
        f"add.u32 scale, scale, {SCALES};",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {word0, word1, word2, word3}, [codes];",
        *[
            f"ld.shared.v2.u32 {{hi{2 * j + nibble}, lo{2 * j + nibble}}}, [scale+{128 * nibble + 32 * j}];"
            for j in range(4)
            for nibble in range(2)
        ],
    ]
    for j in range(4):
        lines += [f"prmt.b32 word{j}, word{j}, word{j}, 0x3120;", *_selectors(f"word{j}")]
        scales = [(f"hi{2 * j + nibble}", f"lo{2 * j + nibble}") for nibble in range(2)]
        lines += _pairs(f"${2 * j}", f"${8 + 2 * j}", dtype, *scales)
        lines += ["shr.u32 code, code, 16;", "shr.u32 top, top, 16;"]
        lines += _pairs(f"${2 * j + 1}", f"${8 + 2 * j + 1}", dtype, *scales)
    return _text(lines, ["codes", "scale", "hi<8>", "lo<8>", "word<4>"])


def _selectors(word: str) -> list[str]:
    """code: byte permutes' selectors into either half of the table; top: then between the two."""
    return [
        f"and.b32 code, {word}, 0x77777777;",
        f"shr.u32 top, {word}, 1;",
        "lop3.b32 top, top, 0x44444444, 0x32103210, 0xea;",  # (top & 0x4444..) | 0x3210..
    ]


def _pairs(low: str, high: str, dtype, low_scale: tuple[str, str], high_scale: tuple[str, str]) -> list[str]:
    """The scaled values of nibbles 0 and 2 of `code` into low, those of nibbles 1 and 3 into high."""
    kind = {"bfloat16": "bf16x2", "float16": "f16x2"}[jnp.dtype(dtype).name]
    lines = []
    for plane, register in enumerate(("lows", "highs")):  # the values' bytes
        words = [f"table{k}" for k in range(4 * plane, 4 * plane + 4)]
        lines += [
            f"prmt.b32 first, {words[0]}, {words[1]}, code;",
            f"prmt.b32 last, {words[2]}, {words[3]}, code;",
            f"prmt.b32 {register}, first, last, top;",
        ]
    for out, (hi, lo), order in ((low, low_scale, "0x6240"), (high, high_scale, "0x7351")):
        lines += [
            f"prmt.b32 pair, lows, highs, {order};",
            f"mul.rn.{kind} rest, pair, {lo};",
            f"fma.rn.{kind} {out}, pair, {hi}, rest;",
        ]
    return lines


def _text(lines: list[str], names: list[str]) -> str:
    names = ["thread", "code", "top", "first", "last", "lows", "highs", "pair", "rest", "table<8>", *names]
    tables = [f"mov.b32 table{k}, {operand};" for k, operand in enumerate(TABLE)]  # no input is read after an output
    return "\n".join(["{", f".reg .b32 {', '.join(names)};", *tables, *lines, "}"])
