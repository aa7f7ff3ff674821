"""y = x W^T from packed codes on 8-bit tensor cores (fp8.py has the maths): a Triton kernel for Ada and Hopper.

Codes are looked up straight to float8_e4m3fn: an entry is one byte, so that one permute a weight does, where 16-bit
entries take two (decode.py has the scheme). Weights are the left operand, as in forward.py. A tile is one
run of in-features wide; its sums are multiplied by the run's two scales and added up in float32: a multiplication and a
multiply-add for each sum and run. Where x is scaled by whole rows only the multiply-add is left: W's scale is the same
for a row of sums, and x's follows once after the loop. On Ada all that and the decoding are fewer clocks than the
tensor cores take. On Hopper, whose tensor cores are four times as fast, they are more, and unless x is scaled by whole
rows also more than dense bf16 takes at its peak (counted in tests/kernels/test_triton_fp8.py; no GPU has run either).
"""

from collections.abc import Sequence

import numpy as np
import triton
import triton.language as tl

from pallas_kernels.nf4_matmul.fp8 import table8
from pallas_kernels.nf4_matmul.triton.decode import load_scales
from pallas_kernels.nf4_matmul.triton.forward import grouped_tile

# outputs: four values of the low nibbles, four of the high ones
# inputs: four bytes of codes; the table's four words, each four times (for every element of a pack the same register)
_CONSTRAINTS = ",".join(["=r"] * 2 + ["r"] * (1 + 4 * 4))


def _assembly() -> str:
    """PTX that turns one word of codes into eight values; outputs come last, they may share inputs' registers."""
    words = [3 + 4 * word for word in range(4)]
    lines = [
        ".reg .b32 code, top, first, last, half0, half1;",
        "and.b32 code, $2, 0x77777777;",
        "shr.u32 top, $2, 1;",
        "lop3.b32 top, top, 0x44444444, 0x32103210, 0xea;",  # (top & 0x4444..) | 0x3210..
    ]
    for half in range(2):
        if half:
            lines += ["shr.u32 code, code, 16;", "shr.u32 top, top, 16;"]
        lines += [
            f"prmt.b32 first, ${words[0]}, ${words[1]}, code;",
            f"prmt.b32 last, ${words[2]}, ${words[3]}, code;",
            f"prmt.b32 half{half}, first, last, top;",  # low 0, high 0, low 1, high 1
        ]
    lines += ["prmt.b32 $0, half0, half1, 0x6420;", "prmt.b32 $1, half0, half1, 0x7531;"]
    return "\n".join(["{", *lines, "}"])


ASSEMBLY = tl.constexpr(_assembly())
CONSTRAINTS = tl.constexpr(_CONSTRAINTS)


def table_words(table: Sequence[float]) -> np.ndarray:
    """uint32 [4]: the 16 entries as fp8.table8 rounds them, four to a word."""
    return table8(tuple(table))[0].view(np.uint32)


@triton.jit
def decode(codes, words):
    """uint8 tile -> (tile of rows o, tile of rows o + O / 2), unscaled, float8_e4m3fn."""
    w0, w1, w2, w3 = words
    return tl.inline_asm_elementwise(
        ASSEMBLY,
        CONSTRAINTS,
        [codes, w0, w1, w2, w3],
        dtype=(tl.float8e4nv, tl.float8e4nv),
        is_pure=True,
        pack=4,
    )


@triton.jit
def forward_kernel(
    x,  # float8_e4m3fn [M, I]
    x_scales,  # float32 [I / BLOCK_I, M], or [1, M] with ROW_SCALES
    codes,  # uint8 [O / 2, I]
    table,  # uint32 [4], see table_words
    absmax,  # [O, C]
    scale_map,  # float32 [256], or None
    nested_absmax,
    offset,
    out,  # [M, O], or float32 [split, M, O]
    rows,  # M
    HALF: tl.constexpr,  # O / 2
    IN_FEATURES: tl.constexpr,
    SCALES_PER_ROW: tl.constexpr,  # C
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,  # one scale for a row of a tile of W, and of x without ROW_SCALES
    SPLIT: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,  # tiles in flight
    ROW_SCALES: tl.constexpr,  # one scale for a whole row of x
):
    words = (tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3))
    TILES_O: tl.constexpr = (HALF + BLOCK_O - 1) // BLOCK_O
    TILES_I: tl.constexpr = IN_FEATURES // BLOCK_I
    TILES_A_SCALE: tl.constexpr = TILES_I // SCALES_PER_ROW
    tile_m, tile_o = grouped_tile(tl.program_id(0), tl.cdiv(rows, BLOCK_M), TILES_O, GROUP_M)
    split = tl.program_id(1)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    m_loaded = tl.minimum(m, rows - 1)  # rows past an edge repeat the last one and are not stored
    o_loaded = tl.minimum(o, HALF - 1)
    x_tile = x + m_loaded[:, None].to(tl.int64) * IN_FEATURES + i[None, :]
    codes_tile = codes + o_loaded[:, None] * IN_FEATURES + i[None, :]
    low_sums = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    high_sums = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    # stages named here also bring the scales in ahead, which meet no tl.dot
    for tile in tl.range(split * TILES_I // SPLIT, (split + 1) * TILES_I // SPLIT, num_stages=STAGES):
        x_T = tl.trans(tl.load(x_tile + tile * BLOCK_I))
        low, high = decode(tl.load(codes_tile + tile * BLOCK_I), words)
        scale = o_loaded * SCALES_PER_ROW + tile // TILES_A_SCALE
        low_scale = load_scales(scale, absmax, scale_map, nested_absmax, offset)[:, None]
        high_scale = load_scales(scale + HALF * SCALES_PER_ROW, absmax, scale_map, nested_absmax, offset)[:, None]
        if not ROW_SCALES:
            x_scale = tl.load(x_scales + tile * rows + m_loaded)[None, :]
            low_scale *= x_scale
            high_scale *= x_scale
        low_sums = tl.fma(tl.dot(low, x_T), tl.broadcast_to(low_scale, low_sums.shape), low_sums)
        high_sums = tl.fma(tl.dot(high, x_T), tl.broadcast_to(high_scale, high_sums.shape), high_sums)
    if ROW_SCALES:
        row_scale = tl.load(x_scales + m_loaded)[None, :]
        low_sums *= row_scale
        high_sums *= row_scale
    out_tile = out + (split * rows + m[:, None]).to(tl.int64) * (2 * HALF) + o[None, :]
    mask = (m[:, None] < rows) & (o[None, :] < HALF)
    tl.store(out_tile, tl.trans(low_sums).to(out.dtype.element_ty), mask=mask)
    tl.store(out_tile + HALF, tl.trans(high_sums).to(out.dtype.element_ty), mask=mask)
