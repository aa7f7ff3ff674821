"""Launches the Triton kernel that decodes inside the product: y = x W^T for up to 16 rows of x, on Ampere and later.

More rows and every backward product take scratch.py: there dequantizing once costs less than decoding in each tile.
Nothing here imports Triton before the kernel is really called.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gpu import current_gpu, load_jax_triton
from pallas_kernels.nf4_matmul import config
from pallas_kernels.nf4_matmul.config import Tiles
from pallas_kernels.nf4_matmul.operands import Codec, Packed
from pallas_kernels.nf4_matmul.shapes import Shape
from pallas_kernels.nf4_matmul.triton.launch import backend_options, scale_operands

LARGEST_HALF = 2**31  # bytes of codes are addressed by 32-bit integers


def unsupported(shape: tuple[int, int], block_size: int, dtype: jnp.dtype) -> str | None:
    """Why the kernel does not take a weight [O, I] with activations of dtype, or None if it does."""
    out_features, in_features = shape
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"x is {jnp.dtype(dtype)}: tensor cores take bfloat16 and float16"
    if out_features % 2:
        return f"O is {out_features}: an odd number of rows has no halves that share x"
    if in_features % block_size:
        return f"I is {in_features}, no multiple of the block size {block_size}: blocks cross rows"
    if block_size < 32 or block_size & (block_size - 1):
        return f"the block size is {block_size}: expected a power of two from 32"
    if out_features * in_features // 2 >= LARGEST_HALF:
        return f"{out_features} x {in_features} weights are more than 2^32"
    return None


def forward(x: jax.Array, packed: Packed, codec: Codec, tiles: Tiles | None = None) -> jax.Array:
    """y [M, O] = x [M, I] W^T in x's dtype, summed in float32; M is at most 16.

    Raises ValueError for more rows, RuntimeError without an NVIDIA GPU from compute capability 8.0, ImportError without
    jax-triton.
    """
    shape, rows = Shape(*codec.shape), x.shape[0]
    if rows > config.FEW_ROWS:
        raise ValueError(f"x has {rows} rows, this kernel takes up to {config.FEW_ROWS}: call scratch.forward")
    if rows == 0:
        return jnp.zeros((0, shape.out_features), x.dtype)
    jax_triton = load_jax_triton("triton")
    from pallas_kernels.nf4_matmul.triton.forward import forward_kernel

    gpu = current_gpu()
    tiles = tiles or config.choose(rows, shape, codec.block_size, gpu)
    return jax_triton.triton_call(
        x,
        *operands(packed, codec, x.dtype),
        rows=rows,
        kernel=forward_kernel,
        out_type=jax.ShapeDtypeStruct((rows, shape.out_features), x.dtype),
        grid=(config.programs(shape, tiles),),
        name="nf4_matmul_forward",
        compute_capability=gpu.compute_capability,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        backend_options=backend_options(gpu.compute_capability),
        cost_estimate={
            "flops": 2 * rows * shape.out_features * shape.in_features,
            "bytes_accessed": x.nbytes
            + packed.codes.nbytes
            + packed.absmax.nbytes
            + rows * shape.out_features * x.dtype.itemsize,
        },
        **constants(codec, x.dtype, tiles),
    )


def operands(packed: Packed, codec: Codec, dtype: jnp.dtype) -> tuple[jax.Array | None, ...]:
    """codes, table, absmax, scale_map, nested_absmax, offset as the kernel takes them."""
    from pallas_kernels.nf4_matmul.triton.decode import table_words

    table = jnp.asarray(table_words(codec.table, jnp.dtype(dtype).name))
    return packed.codes, table, *scale_operands(packed, codec)


def constants(codec: Codec, dtype: jnp.dtype, tiles: Tiles) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    import triton.language as tl

    out_features, in_features = codec.shape
    return {
        "HALF": out_features // 2,
        "IN_FEATURES": in_features,
        "SCALES_PER_ROW": in_features // codec.block_size,
        "BLOCK_M": config.FEW_ROWS,
        "BLOCK_O": tiles.block_o,
        "BLOCK_I": tiles.block_i,
        "SPLIT": tiles.split,
        "DTYPE": getattr(tl, jnp.dtype(dtype).name),
    }
