"""Launches the Triton kernel that writes W in 16 bits; XLA multiplies by it, and the next layer reuses its memory.

For many rows of x: the products are dense ones, and W costs one write and one read of two bytes a weight. Nothing here
imports Triton before the kernel is really called.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gpu import current_gpu, load_jax_triton
from pallas_kernels.nf4_matmul.dense import dense_matmul
from pallas_kernels.nf4_matmul.operands import Codec, Packed
from pallas_kernels.nf4_matmul.triton.launch import backend_options, scale_operands

LARGEST = 2**31  # values are addressed by 32-bit integers
WARPS = 4
BYTES = 8 * 32 * WARPS  # of a program: a thread reads 8 bytes and writes 16 bytes twice


def unsupported(shape: tuple[int, int], block_size: int, dtype: jnp.dtype) -> str | None:
    """Why the kernel does not write a weight [O, I] in dtype, or None if it does."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"x is {jnp.dtype(dtype)}: the scratch is bfloat16 or float16"
    if block_size < 32 or block_size & (block_size - 1):
        return f"the block size is {block_size}: expected a power of two from 32"
    if shape[0] * shape[1] >= LARGEST - BYTES:
        return f"{shape[0]} x {shape[1]} weights are more than 2^31"
    return None


def forward(x: jax.Array, packed: Packed, codec: Codec) -> jax.Array:
    """y [M, O] = x [M, I] W^T in x's dtype, summed in float32."""
    return _multiply(x, packed, codec, contract=1)


def backward(dy: jax.Array, packed: Packed, codec: Codec) -> jax.Array:
    """dx [M, I] = dy [M, O] W in dy's dtype, summed in float32."""
    return _multiply(dy, packed, codec, contract=0)


def _multiply(x: jax.Array, packed: Packed, codec: Codec, contract: int) -> jax.Array:
    if x.shape[0] == 0:
        return jnp.zeros((0, codec.shape[1 - contract]), x.dtype)
    return dense_matmul(x, dequantize(packed, codec, x.dtype), contract)


def dequantize(packed: Packed, codec: Codec, dtype: jnp.dtype) -> jax.Array:
    """W [O, I] in dtype (bfloat16 or float16), bit-exact with reference.dequantize.

    Raises RuntimeError without an NVIDIA GPU from compute capability 8.0, ImportError without jax-triton.
    """
    jax_triton = load_jax_triton("scratch")
    from pallas_kernels.nf4_matmul.triton.dequantize import dequantize_kernel

    values = codec.shape[0] * codec.shape[1]
    arrays = operands(packed, codec)
    gpu = current_gpu("scratch")
    return jax_triton.triton_call(
        *arrays,
        kernel=dequantize_kernel,
        out_type=jax.ShapeDtypeStruct(codec.shape, dtype),
        grid=(programs(codec),),
        name="nf4_dequantize",
        compute_capability=gpu.compute_capability,
        num_warps=WARPS,
        num_stages=1,
        backend_options=backend_options(gpu.compute_capability),
        cost_estimate={
            "flops": values,
            "bytes_accessed": packed.codes.nbytes + packed.absmax.nbytes + values * jnp.dtype(dtype).itemsize,
        },
        **constants(codec),
    )


def programs(codec: Codec) -> int:
    """Programs of a call."""
    return -(-_half(codec) // BYTES)


def operands(packed: Packed, codec: Codec) -> tuple[jax.Array | None, ...]:
    """codes, table, absmax, scale_map, nested_absmax, offset as the kernel takes them."""
    table = jnp.asarray(np.asarray(codec.table, np.float32))
    return packed.codes, table, *scale_operands(packed, codec)


def constants(codec: Codec) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    half, block_size = _half(codec), codec.block_size
    return {
        "VALUES": codec.shape[0] * codec.shape[1],
        "HALF": half,
        "BLOCK_SIZE": block_size,
        "BYTES": BYTES,
        "RUN": 1 if half % block_size else min(block_size, BYTES),
    }


def _half(codec: Codec) -> int:
    return -(-codec.shape[0] * codec.shape[1] // 2)
