"""The low-rank term of an adapter, added to a kernel's sums after its loop: y = x W^T + u B^T and dx = dy W + du A.

u and du [M, R] are small and come ready from outside. The rank is summed in pieces of BLOCK_R, masked past its end. A
pack's adapters stand one after another in every array but the weight's; a tile of rows belongs to one of them.
"""

import triton
import triton.language as tl

HIDE = tl.constexpr("mov.b32 $0, $1;")


@triton.jit
def place_in_pack(tile, rows, BLOCK_M: tl.constexpr):
    """A tile of rows counted over the pack -> (its adapter, its tile in that adapter); `rows` is one adapter's."""
    tiles = tl.cdiv(rows, BLOCK_M)
    adapter = tile // tiles
    return adapter.to(tl.int64), tile - adapter * tiles


@triton.jit
def rank_of_split(split, RANK: tl.constexpr):
    """Where the sum over the rank ends: programs that share an output tile leave it to the first.

    The number passes an assembly that does nothing: a loop whose count is known is unrolled, and large ranks spill.
    """
    end = tl.where(split == 0, RANK, 0)
    return tl.inline_asm_elementwise(HIDE, "=r,r", [end], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def add_forward(
    low_sums,  # float32 [BLOCK_O, BLOCK_M]
    high_sums,
    u,  # [M, R]
    b,  # [O, R]
    m,
    o,  # rows of B that exist, in its lower half
    rows,
    end,
    HALF: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Both halves' sums with B u^T added."""
    for first in tl.range(0, end, BLOCK_R, num_stages=1):
        r = first + tl.arange(0, BLOCK_R)
        u_tile = u + m[:, None].to(tl.int64) * RANK + r[None, :]
        u_T = tl.trans(tl.load(u_tile, mask=(m[:, None] < rows) & (r[None, :] < RANK), other=0.0))
        b_tile = b + o[:, None] * RANK + r[None, :]
        mask = r[None, :] < RANK
        low_sums = tl.dot(tl.load(b_tile, mask=mask, other=0.0), u_T, low_sums)
        high_sums = tl.dot(tl.load(b_tile + HALF * RANK, mask=mask, other=0.0), u_T, high_sums)
    return low_sums, high_sums


@triton.jit
def add_backward(
    sums,  # float32 [BLOCK_M, BLOCK_I]
    du,  # [M, R]
    a,  # [R, I]
    m,
    i,
    rows,
    end,
    IN_FEATURES: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The sums with du A added."""
    for first in tl.range(0, end, BLOCK_R, num_stages=1):
        r = first + tl.arange(0, BLOCK_R)
        du_tile = du + m[:, None].to(tl.int64) * RANK + r[None, :]
        left = tl.load(du_tile, mask=(m[:, None] < rows) & (r[None, :] < RANK), other=0.0)
        a_tile = a + r[:, None] * IN_FEATURES + i[None, :]
        sums = tl.dot(left, tl.load(a_tile, mask=r[:, None] < RANK, other=0.0), sums)
    return sums
