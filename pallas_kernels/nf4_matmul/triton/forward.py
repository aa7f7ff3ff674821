"""y = x W^T from packed codes: one Triton kernel for every row count, from decoding (1 row) to training.

A tile of bytes [block_o, block_i] holds rows o and o + O / 2 of W, two weight tiles that meet the same tile of x.
Weights are the left operand of the tensor cores (W x^T), so that few rows of x still fill an instruction.
With an adapter, or a pack of them, u B^T joins the sums at the end (lora.py).
"""

import triton
import triton.language as tl

from pallas_kernels.nf4_matmul.triton.decode import decode, load_scales, load_table, pin
from pallas_kernels.nf4_matmul.triton.lora import add_forward, place_in_pack, rank_of_split


@triton.jit
def forward_kernel(
    x,  # [M, I]; with adapters one after another [A * M, I], and so u and out
    codes,  # uint8 [O / 2, I]
    table,  # uint32 [8], see triton_decode.table_words
    absmax,  # [O, C]
    scale_map,  # float32 [256], or None
    nested_absmax,
    offset,
    u,  # [M, R], or None: no adapter
    b,  # [A * O, R], or None
    out,  # [M, O] in x's dtype, or float32 [split, M, O]
    rows,  # M, of one adapter
    HALF: tl.constexpr,  # O / 2
    IN_FEATURES: tl.constexpr,
    SCALES_PER_ROW: tl.constexpr,  # C
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,  # divides the quantization block: one scale for a row of a tile
    SPLIT: tl.constexpr,
    GROUP_M: tl.constexpr,
    ADAPTERS: tl.constexpr,  # A, 1 without
    RANK: tl.constexpr,  # R
    BLOCK_R: tl.constexpr,
    SCALE_SUMS: tl.constexpr,  # scale the tile's sums (few rows), not its weights (many rows)
    DTYPE: tl.constexpr,
):
    words = load_table(table)
    TILES_O: tl.constexpr = (HALF + BLOCK_O - 1) // BLOCK_O
    TILES_I: tl.constexpr = IN_FEATURES // BLOCK_I
    TILES_A_SCALE: tl.constexpr = TILES_I // SCALES_PER_ROW
    tile_m, tile_o = grouped_tile(tl.program_id(0), ADAPTERS * tl.cdiv(rows, BLOCK_M), TILES_O, GROUP_M)
    split = tl.program_id(1)
    if u is not None:
        adapter, tile_m = place_in_pack(tile_m, rows, BLOCK_M)
        x += adapter * rows * IN_FEATURES
        u += adapter * rows * RANK
        b += adapter * (2 * HALF * RANK)
        out += adapter * rows * (2 * HALF)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    o_loaded = tl.minimum(o, HALF - 1)  # rows past the edge repeat the last one and are not stored
    x_tile = x + m[:, None].to(tl.int64) * IN_FEATURES + i[None, :]
    codes_tile = codes + o_loaded[:, None] * IN_FEATURES + i[None, :]
    low_sums = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    high_sums = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    for tile in range(split * TILES_I // SPLIT, (split + 1) * TILES_I // SPLIT):
        x_T = tl.trans(tl.load(x_tile + tile * BLOCK_I, mask=m[:, None] < rows, other=0.0))
        low, high = decode(tl.load(codes_tile + tile * BLOCK_I), words, DTYPE)
        scale = o_loaded * SCALES_PER_ROW + tile // TILES_A_SCALE
        low_scale = load_scales(scale, absmax, scale_map, nested_absmax, offset)[:, None]
        high_scale = load_scales(scale + HALF * SCALES_PER_ROW, absmax, scale_map, nested_absmax, offset)[:, None]
        if not SCALE_SUMS:
            low = (low.to(tl.float32) * low_scale).to(DTYPE)
            high = (high.to(tl.float32) * high_scale).to(DTYPE)
        low = pin(low, DTYPE)
        high = pin(high, DTYPE)
        if SCALE_SUMS:
            low_sums = tl.fma(tl.dot(low, x_T), tl.broadcast_to(low_scale, low_sums.shape), low_sums)
            high_sums = tl.fma(tl.dot(high, x_T), tl.broadcast_to(high_scale, high_sums.shape), high_sums)
        else:
            low_sums = tl.dot(low, x_T, low_sums)
            high_sums = tl.dot(high, x_T, high_sums)
    if u is not None:
        end = rank_of_split(split, RANK)
        low_sums, high_sums = add_forward(low_sums, high_sums, u, b, m, o_loaded, rows, end, HALF, RANK, BLOCK_R)
    out_tile = out + (split * ADAPTERS * rows + m[:, None]).to(tl.int64) * (2 * HALF) + o[None, :]
    mask = (m[:, None] < rows) & (o[None, :] < HALF)
    tl.store(out_tile, tl.trans(low_sums).to(out.dtype.element_ty), mask=mask)
    tl.store(out_tile + HALF, tl.trans(high_sums).to(out.dtype.element_ty), mask=mask)


@triton.jit
def grouped_tile(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(tile of rows, tile of columns) of a program: GROUP_M tiles of rows run side by side and share weights in L2."""
    group = program // (GROUP_M * tiles_n)
    first = group * GROUP_M
    size = tl.minimum(tiles_m - first, GROUP_M)
    within = program - group * GROUP_M * tiles_n
    return first + within % size, within // size
