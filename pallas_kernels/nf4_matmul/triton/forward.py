"""y = x W^T from packed codes for up to 16 rows of x, a Triton kernel: reading the packed bytes is the bound.

A tile of bytes [block_o, block_i] holds rows o and o + O / 2 of W, two weight tiles that meet the same tile of x.
Weights are the left operand of the tensor cores (W x^T), so that one row of x still fills an instruction. Scales meet
the sums of a tile, of which there are fewer than weights.

A program takes `split` neighbouring tiles at a time, a batch of products: warps of their own sum each part of the
columns, and the program adds the parts at its end. So few rows of W still keep many warps busy, results are the same on
every run, and no second kernel follows.

Up to three weights of one x share a launch: programs are numbered through all of them, and each picks its pointers.
"""

import triton
import triton.language as tl

from pallas_kernels.nf4_matmul.triton.decode import decode, load_scales, load_table, pin


@triton.jit
def forward_kernel(
    x,  # [M, I]
    table,  # uint32 [8], see decode.table_words
    scale_map,  # float32 [256], or None
    codes_0,  # uint8 [O / 2, I] of the first weight
    absmax_0,  # [O, C]
    nested_0,
    offset_0,
    codes_1,  # of the second weight, or None
    absmax_1,
    nested_1,
    offset_1,
    codes_2,
    absmax_2,
    nested_2,
    offset_2,
    out,  # [M, sum of O] in x's dtype
    rows,  # M
    HALF_0: tl.constexpr,  # O / 2 of each weight, 0 where there is none
    HALF_1: tl.constexpr,
    HALF_2: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    SCALES_PER_ROW: tl.constexpr,  # C
    BLOCK_M: tl.constexpr,  # 16: M is at most that
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,  # divides the quantization block: one scale for a row of a tile
    SPLIT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    words = load_table(table)
    block, half, first_out = tl.program_id(0), HALF_0, 0
    codes, absmax, nested_absmax, offset = codes_0, absmax_0, nested_0, offset_0
    if codes_1 is not None:
        FIRST_1: tl.constexpr = (HALF_0 + BLOCK_O - 1) // BLOCK_O
        is_mine = tl.program_id(0) >= FIRST_1
        block = tl.where(is_mine, tl.program_id(0) - FIRST_1, block)
        half, first_out = tl.where(is_mine, HALF_1, half), tl.where(is_mine, 2 * HALF_0, 0)
        codes, absmax = tl.where(is_mine, codes_1, codes), tl.where(is_mine, absmax_1, absmax)
        if scale_map is not None:
            nested_absmax, offset = tl.where(is_mine, nested_1, nested_absmax), tl.where(is_mine, offset_1, offset)
    if codes_2 is not None:
        FIRST_2: tl.constexpr = (HALF_0 + BLOCK_O - 1) // BLOCK_O + (HALF_1 + BLOCK_O - 1) // BLOCK_O
        is_mine = tl.program_id(0) >= FIRST_2
        block = tl.where(is_mine, tl.program_id(0) - FIRST_2, block)
        half, first_out = tl.where(is_mine, HALF_2, half), tl.where(is_mine, 2 * (HALF_0 + HALF_1), first_out)
        codes, absmax = tl.where(is_mine, codes_2, codes), tl.where(is_mine, absmax_2, absmax)
        if scale_map is not None:
            nested_absmax, offset = tl.where(is_mine, nested_2, nested_absmax), tl.where(is_mine, offset_2, offset)
    TILES_I: tl.constexpr = IN_FEATURES // BLOCK_I
    TILES_A_SCALE: tl.constexpr = TILES_I // SCALES_PER_ROW
    part = tl.arange(0, SPLIT)
    m = tl.arange(0, BLOCK_M)
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    is_row = m[None, :, None] < rows
    o_loaded = tl.minimum(o, half - 1)  # rows past the edge repeat the last one and are not stored
    columns = part[:, None, None] * BLOCK_I + tl.arange(0, BLOCK_I)[None, None, :]
    x_tiles = x + m[None, :, None] * IN_FEATURES + columns
    codes_tiles = codes + o_loaded[None, :, None] * IN_FEATURES + columns
    low_sums = tl.zeros((SPLIT, BLOCK_O, BLOCK_M), tl.float32)
    high_sums = tl.zeros((SPLIT, BLOCK_O, BLOCK_M), tl.float32)
    for first in range(0, TILES_I, SPLIT):
        tile = first + part
        is_there = (tile < TILES_I)[:, None, None]  # past the last tile x is zero
        x_T = tl.trans(tl.load(x_tiles + first * BLOCK_I, mask=is_there & is_row, other=0.0), 0, 2, 1)
        low, high = decode(tl.load(codes_tiles + first * BLOCK_I, mask=is_there, other=0), words, DTYPE)
        scale = o_loaded[None, :] * SCALES_PER_ROW + (tl.minimum(tile, TILES_I - 1) // TILES_A_SCALE)[:, None]
        low_scale = load_scales(scale, absmax, scale_map, nested_absmax, offset)[:, :, None]
        high_scale = load_scales(scale + half * SCALES_PER_ROW, absmax, scale_map, nested_absmax, offset)[:, :, None]
        low = pin(low, DTYPE)
        high = pin(high, DTYPE)
        low_sums = tl.fma(tl.dot(low, x_T), tl.broadcast_to(low_scale, low_sums.shape), low_sums)
        high_sums = tl.fma(tl.dot(high, x_T), tl.broadcast_to(high_scale, high_sums.shape), high_sums)
    out_tile = out + m[:, None] * (2 * (HALF_0 + HALF_1 + HALF_2)) + first_out + o[None, :]
    mask = (m[:, None] < rows) & (o[None, :] < half)
    tl.store(out_tile, tl.trans(tl.sum(low_sums, 0)).to(out.dtype.element_ty), mask=mask)
    tl.store(out_tile + half, tl.trans(tl.sum(high_sums, 0)).to(out.dtype.element_ty), mask=mask)
