"""y = x W^T from packed codes for up to 16 rows of x, a Triton kernel: reading the packed bytes is the bound.

A tile of bytes [block_o, block_i] holds rows o and o + O / 2 of W, two weight tiles that meet the same tile of x.
Weights are the left operand of the tensor cores (W x^T), so that one row of x still fills an instruction. Scales meet
the sums of a tile, of which there are fewer than weights.
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
    out,  # [M, O] in x's dtype, or float32 [split, M, O]
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
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    o_loaded = tl.minimum(o, HALF - 1)  # rows past the edge repeat the last one and are not stored
    x_tile = x + m[:, None] * IN_FEATURES + i[None, :]
    codes_tile = codes + o_loaded[:, None] * IN_FEATURES + i[None, :]
    low_sums = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    high_sums = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    for tile in range(split * TILES_I // SPLIT, (split + 1) * TILES_I // SPLIT):
        x_T = tl.trans(tl.load(x_tile + tile * BLOCK_I, mask=m[:, None] < rows, other=0.0))
        low, high = decode(tl.load(codes_tile + tile * BLOCK_I), words, DTYPE)
        scale = o_loaded * SCALES_PER_ROW + tile // TILES_A_SCALE
        low_scale = load_scales(scale, absmax, scale_map, nested_absmax, offset)[:, None]
        high_scale = load_scales(scale + HALF * SCALES_PER_ROW, absmax, scale_map, nested_absmax, offset)[:, None]
        low = pin(low, DTYPE)
        high = pin(high, DTYPE)
        low_sums = tl.fma(tl.dot(low, x_T), tl.broadcast_to(low_scale, low_sums.shape), low_sums)
        high_sums = tl.fma(tl.dot(high, x_T), tl.broadcast_to(high_scale, high_sums.shape), high_sums)
    out_tile = out + (split * rows + m[:, None]) * (2 * HALF) + o[None, :]
    mask = (m[:, None] < rows) & (o[None, :] < HALF)
    tl.store(out_tile, tl.trans(low_sums).to(out.dtype.element_ty), mask=mask)
    tl.store(out_tile + HALF, tl.trans(high_sums).to(out.dtype.element_ty), mask=mask)
