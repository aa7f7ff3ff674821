"""W in 16 bits from packed codes, a Triton kernel: bit-exact with reference.dequantize, bound by the bytes it writes.

A program takes a run of bytes of the flat layout (reference.py), so blocks may cross rows and numbers may be odd: its
low nibbles become one run of W, its high nibbles another, ceil(O * I / 2) values on. Values and scales are float32 and
rounded once, which the byte permutes of the other kernel (decode.py) do not do; the table is read from memory,
where its 64 bytes stay in the first cache: 11 to 12 instructions a weight, where an H200 affords about 18 in the time
that its 2.5 bytes take.
"""

import triton
import triton.language as tl

from pallas_kernels.nf4_matmul.triton.decode import load_scales


@triton.jit
def dequantize_kernel(
    codes,  # uint8 [ceil(n / 2)], n = O * I
    table,  # float32 [16]
    absmax,  # [ceil(n / block size)]
    scale_map,  # float32 [256], or None
    nested_absmax,
    offset,
    out,  # [n]
    VALUES: tl.constexpr,  # n
    HALF: tl.constexpr,  # bytes of codes
    BLOCK_SIZE: tl.constexpr,  # values that share one scale
    BYTES: tl.constexpr,  # of a program; a multiple of RUN
    RUN: tl.constexpr,  # bytes that share their two scales; 1 where a block may begin anywhere in the high nibbles
):
    first = tl.program_id(0) * BYTES
    run = first + tl.arange(0, BYTES // RUN)[:, None] * RUN
    byte = run + tl.arange(0, RUN)[None, :]
    code = tl.load(codes + byte, mask=byte < HALF, other=0).to(tl.int32)
    high = byte + HALF
    last_scale: tl.constexpr = (VALUES + BLOCK_SIZE - 1) // BLOCK_SIZE - 1
    low_scale = tl.minimum(run // BLOCK_SIZE, last_scale)  # runs past the end are not stored
    high_scale = tl.minimum((run + HALF) // BLOCK_SIZE, last_scale)
    low_scale = load_scales(low_scale, absmax, scale_map, nested_absmax, offset)
    high_scale = load_scales(high_scale, absmax, scale_map, nested_absmax, offset)
    low_value = scaled(tl.load(table + (code & 0xF)), low_scale, out.dtype.element_ty)
    high_value = scaled(tl.load(table + (code >> 4)), high_scale, out.dtype.element_ty)
    tl.store(out + byte, low_value, mask=byte < HALF)
    tl.store(out + high, high_value, mask=high < VALUES)


@triton.jit
def scaled(value, scale, DTYPE: tl.constexpr):
    """value * scale rounded once; adding +0 makes +0 of -0 and changes nothing else."""
    return (value * scale).to(DTYPE) + 0.0
