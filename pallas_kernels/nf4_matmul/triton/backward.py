"""dx = dy W from packed codes, a Triton kernel: the sum runs over out-features.

A tile of bytes [block_o, block_i] holds rows o and o + O / 2 of W; they meet two tiles of dy and
add into one tile of dx. With an adapter, or a pack of them, du A joins the sums at the end (lora.py).
"""

import triton
import triton.language as tl

from pallas_kernels.nf4_matmul.triton.decode import decode, load_scales, load_table, pin
from pallas_kernels.nf4_matmul.triton.forward import grouped_tile
from pallas_kernels.nf4_matmul.triton.lora import add_backward, place_in_pack, rank_of_split


@triton.jit
def backward_kernel(
    dy,  # [M, O]; with adapters one after another [A * M, O], and so du and out
    codes,  # uint8 [O / 2, I]
    table,  # uint32 [8], see triton_decode.table_words
    absmax,  # [O, C]
    scale_map,  # float32 [256], or None
    nested_absmax,
    offset,
    du,  # [M, R], or None: no adapter
    a,  # [A * R, I], or None
    out,  # [M, I] in dy's dtype, or float32 [split, M, I]
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
    DTYPE: tl.constexpr,
):
    words = load_table(table)
    TILES_O: tl.constexpr = (HALF + BLOCK_O - 1) // BLOCK_O
    TILES_I: tl.constexpr = IN_FEATURES // BLOCK_I
    TILES_A_SCALE: tl.constexpr = TILES_I // SCALES_PER_ROW
    tile_m, tile_i = grouped_tile(tl.program_id(0), ADAPTERS * tl.cdiv(rows, BLOCK_M), TILES_I, GROUP_M)
    split = tl.program_id(1)
    if du is not None:
        adapter, tile_m = place_in_pack(tile_m, rows, BLOCK_M)
        dy += adapter * rows * (2 * HALF)
        du += adapter * rows * RANK
        a += adapter * (RANK * IN_FEATURES)
        out += adapter * rows * IN_FEATURES
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    sums = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    for tile in range(split * TILES_O // SPLIT, (split + 1) * TILES_O // SPLIT):
        o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
        o_loaded = tl.minimum(o, HALF - 1)  # rows past the edge repeat the last one and meet zeros
        dy_tile = dy + m[:, None].to(tl.int64) * (2 * HALF) + o[None, :]
        mask = (m[:, None] < rows) & (o[None, :] < HALF)
        dy_low = tl.load(dy_tile, mask=mask, other=0.0)
        dy_high = tl.load(dy_tile + HALF, mask=mask, other=0.0)
        low, high = decode(tl.load(codes + o_loaded[:, None] * IN_FEATURES + i[None, :]), words, DTYPE)
        scale = o_loaded * SCALES_PER_ROW + tile_i // TILES_A_SCALE
        low_scale = load_scales(scale, absmax, scale_map, nested_absmax, offset)[:, None]
        high_scale = load_scales(scale + HALF * SCALES_PER_ROW, absmax, scale_map, nested_absmax, offset)[:, None]
        low = pin((low.to(tl.float32) * low_scale).to(DTYPE), DTYPE)
        high = pin((high.to(tl.float32) * high_scale).to(DTYPE), DTYPE)
        sums = tl.dot(dy_low, low, sums)
        sums = tl.dot(dy_high, high, sums)
    if du is not None:
        end = rank_of_split(split, RANK)
        sums = add_backward(sums, du, a, m, i, rows, end, IN_FEATURES, RANK, BLOCK_R)
    out_tile = out + (split * ADAPTERS * rows + m[:, None]).to(tl.int64) * IN_FEATURES + i[None, :]
    tl.store(out_tile, sums.to(out.dtype.element_ty), mask=m[:, None] < rows)
