"""Launches the Triton kernel that decodes inside the product: y = x W^T for up to 16 rows of x, on Ampere and later.

More rows and every backward product take scratch.py: there dequantizing once costs less than decoding in each tile.
Nothing here imports Triton before the kernel is really called.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gpu import current_gpu, load_jax_triton
from pallas_kernels.nf4_matmul import config
from pallas_kernels.nf4_matmul.config import Tiles
from pallas_kernels.nf4_matmul.operands import Codec, Packed, are_alike
from pallas_kernels.nf4_matmul.shapes import Shape
from pallas_kernels.nf4_matmul.triton.launch import backend_options, scale_operands

MOST = 3  # weights that share a launch
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
    """y [M, O] = x [M, I] W^T in x's dtype, summed in float32; as `forward_joined` of one weight."""
    return forward_joined(x, (packed,), (codec,), tiles)


def forward_joined(
    x: jax.Array, packed: Sequence[Packed], codecs: Sequence[Codec], tiles: Tiles | None = None
) -> jax.Array:
    """y [M, sum of O] of up to MOST weights side by side, in x's dtype, summed in float32; M is at most 16.

    Several weights are those that `may_join`; by default they take the tiles of the first.
    Raises ValueError for more rows, RuntimeError without an NVIDIA GPU from compute capability 8.0, ImportError without
    jax-triton.
    """
    first, rows = codecs[0], x.shape[0]
    if rows > config.FEW_ROWS:
        raise ValueError(f"x has {rows} rows, this kernel takes up to {config.FEW_ROWS}: call scratch.forward")
    columns = sum(codec.shape[0] for codec in codecs)
    if rows == 0:
        return jnp.zeros((0, columns), x.dtype)
    jax_triton = load_jax_triton("triton")
    from pallas_kernels.nf4_matmul.triton.forward import forward_kernel

    gpu = current_gpu()
    tiles = tiles or config.choose(rows, Shape(*first.shape), first.block_size, gpu)
    read = sum(array.nbytes for one in packed for array in (one.codes, one.absmax))
    return jax_triton.triton_call(
        x,
        *operands(packed, codecs, x.dtype),
        rows=rows,
        kernel=forward_kernel,
        out_type=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        grid=(programs(codecs, tiles),),
        name="nf4_matmul_forward",
        compute_capability=gpu.compute_capability,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        backend_options=backend_options(gpu.compute_capability),
        cost_estimate={
            "flops": 2 * rows * columns * first.shape[1],
            "bytes_accessed": x.nbytes + read + rows * columns * x.dtype.itemsize,
        },
        **constants(codecs, x.dtype, tiles),
    )


def may_join(packed: Sequence[Packed], codecs: Sequence[Codec]) -> bool:
    """Whether weights of one x can share a launch: what differs is out-features alone."""
    return len(packed) <= MOST and are_alike(packed, codecs)


def programs(codecs: Sequence[Codec], tiles: Tiles) -> int:
    return sum(config.programs(Shape(*codec.shape), tiles) for codec in codecs)


def operands(packed: Sequence[Packed], codecs: Sequence[Codec], dtype: jnp.dtype) -> tuple[jax.Array | None, ...]:
    """table, scale_map, and of each weight codes, absmax, nested_absmax, offset, as the kernel takes them."""
    from pallas_kernels.nf4_matmul.triton.decode import table_words

    table = jnp.asarray(table_words(codecs[0].table, jnp.dtype(dtype).name))
    scales = [scale_operands(*weight) for weight in zip(packed, codecs, strict=True)]
    weights = [(one.codes, absmax, *nested) for one, (absmax, _, *nested) in zip(packed, scales, strict=True)]
    weights += [(None,) * 4] * (MOST - len(packed))
    return table, scales[0][1], *(array for arrays in weights for array in arrays)


def constants(codecs: Sequence[Codec], dtype: jnp.dtype, tiles: Tiles) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    import triton.language as tl

    halves = [codec.shape[0] // 2 for codec in codecs] + [0] * (MOST - len(codecs))
    in_features = codecs[0].shape[1]
    return {f"HALF_{k}": half for k, half in enumerate(halves)} | {
        "IN_FEATURES": in_features,
        "SCALES_PER_ROW": in_features // codecs[0].block_size,
        "BLOCK_M": config.FEW_ROWS,
        "BLOCK_O": tiles.block_o,
        "BLOCK_I": tiles.block_i,
        "SPLIT": tiles.split,
        "DTYPE": getattr(tl, jnp.dtype(dtype).name),
    }
