"""What the kernels share: scores of products, in units of log2, and which keys a query sees."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
MASKED = tl.constexpr(-1.0e30)  # below every score: exp2 of it less any is 0, and of it less itself no NaN


@triton.jit
def bent(products, SCALE: tl.constexpr, CAP: tl.constexpr):
    """tanh(SCALE * products / CAP): of large ones 1, with no overflow that is a NaN."""
    return 1.0 - 2.0 / (tl.exp2(products * (2.0 * SCALE / CAP * LOG2E)) + 1.0)


@triton.jit
def scored(products, slope, distance, SCALE: tl.constexpr, CAP: tl.constexpr):
    """float32 products -> scores times log2(e). slope: or None. distance: int32, of a key behind its query."""
    if CAP != 0:  # noqa: SIM108 (of a conditional expression Triton compiles both)
        scores = bent(products, SCALE, CAP) * (CAP * LOG2E)
    else:
        scores = products * (SCALE * LOG2E)
    if slope is not None:
        scores = scores - slope * LOG2E * distance.to(tl.float32)
    return scores


@triton.jit
def load_rows(base, rows, row_stride: tl.constexpr, h, T, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """A tile [rows, BLOCK_H]; zeros past the last token and past the head's width."""
    if BLOCK_H == H:
        return tl.load(base + rows[:, None] * row_stride + h[None, :], mask=rows[:, None] < T, other=0.0)
    return tl.load(
        base + rows[:, None] * row_stride + h[None, :], mask=(rows[:, None] < T) & (h[None, :] < H), other=0.0
    )


@triton.jit
def store_rows(base, rows, row_stride: tl.constexpr, h, T, H: tl.constexpr, values):
    """The tile's rows and columns that are there."""
    mask = (rows[:, None] < T) & (h[None, :] < H)
    tl.store(base + rows[:, None] * row_stride + h[None, :], values.to(base.dtype.element_ty), mask=mask)
