"""y = x W^T from packed codes for up to 16 rows of x, a Triton kernel: reading the packed bytes is the bound.

A tile of bytes [block_o, block_i] holds rows o and o + O / 2 of W, two weight tiles that meet the same tile of x.
Weights are the left operand of the tensor cores (W x^T), so that one row of x still fills an instruction. Scales meet
the sums of a tile, of which there are fewer than weights.

A program takes `split` neighbouring tiles at a time, a batch of products: warps of their own sum each part of the
columns, and the program adds the parts at its end. So few rows of W still keep many warps busy, results are the same on
every run, and no second kernel follows.
"""

import triton
import triton.language as tl

from pallas_kernels.nf4_matmul.triton.decode import decode, load_scales, load_table, pin


@triton.jit
def forward_kernel(
    x,  # [M, I]
    codes,  # uint8 [O / 2, I]
    table,  # uint32 [8], see decode.table_words
    absmax,  # [O, C]
    scale_map,  # float32 [256], or None
    nested_absmax,
    offset,
    out,  # [M, O] in x's dtype
    rows,  # M
    HALF: tl.constexpr,  # O / 2
    IN_FEATURES: tl.constexpr,
    SCALES_PER_ROW: tl.constexpr,  # C
    BLOCK_M: tl.constexpr,  # 16: M is at most that
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,  # divides the quantization block: one scale for a row of a tile
    SPLIT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    words = load_table(table)
    TILES_I: tl.constexpr = IN_FEATURES // BLOCK_I
    TILES_A_SCALE: tl.constexpr = TILES_I // SCALES_PER_ROW
    part = tl.arange(0, SPLIT)
    m = tl.arange(0, BLOCK_M)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_row = m[None, :, None] < rows
    o_loaded = tl.minimum(o, HALF - 1)  # rows past the edge repeat the last one and are not stored
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
        high_scale = load_scales(scale + HALF * SCALES_PER_ROW, absmax, scale_map, nested_absmax, offset)[:, :, None]
        low = pin(low, DTYPE)
        high = pin(high, DTYPE)
        low_sums = tl.fma(tl.dot(low, x_T), tl.broadcast_to(low_scale, low_sums.shape), low_sums)
        high_sums = tl.fma(tl.dot(high, x_T), tl.broadcast_to(high_scale, high_sums.shape), high_sums)
    out_tile = out + m[:, None] * (2 * HALF) + o[None, :]
    mask = (m[:, None] < rows) & (o[None, :] < HALF)
    tl.store(out_tile, tl.trans(tl.sum(low_sums, 0)).to(out.dtype.element_ty), mask=mask)
    tl.store(out_tile + HALF, tl.trans(tl.sum(high_sums, 0)).to(out.dtype.element_ty), mask=mask)
