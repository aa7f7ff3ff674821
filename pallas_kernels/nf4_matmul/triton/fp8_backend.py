"""Launches the 8-bit Triton kernel (fp8.py beside it): y = x W^T on Ada and Hopper, forward only (fp8.py above says
why)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.nf4_matmul import config, fp8
from pallas_kernels.nf4_matmul.config import Gpu, Tiles
from pallas_kernels.nf4_matmul.operands import Codec, Packed
from pallas_kernels.nf4_matmul.shapes import Shape
from pallas_kernels.nf4_matmul.triton import backend as triton_backend

CAPABILITIES = (89, 90)  # tensor cores of earlier GPUs have no 8-bit floats; for later ones the kernel is not compiled


def unsupported(shape: tuple[int, int], block_size: int, dtype: jnp.dtype) -> str | None:
    """Why the kernel does not take a weight [O, I] with activations of dtype on this GPU, or None if it does.

    Raises RuntimeError where there is no NVIDIA GPU.
    """
    if reason := triton_backend.unsupported(shape, block_size, dtype):
        return reason
    gpu = triton_backend.current_gpu()
    if gpu.compute_capability not in CAPABILITIES:
        return f"{gpu.name} has compute capability {gpu.compute_capability / 10}: the 8-bit kernel is for 8.9 and 9.0"
    return None


def heuristic(rows: int, shape: Shape, block_size: int, gpu: Gpu) -> Tiles:
    """Tiles from counting instructions; nothing here was measured.

    128 rows share one decoding. Sums are scaled in registers: 2 * 64 rows of W leave room for them at 8 warps.
    """
    block_m = min(128, max(16, config.row_bucket(rows)))
    tiles = Tiles(
        block_m=block_m,
        block_o=64,
        block_i=min(fp8.RUN, block_size),
        split=1,
        group_m=8,
        num_warps=8 if block_m == 128 else 4,
        num_stages=3,
        scale_sums=True,
        scales_in_kernel=rows <= config.FEW_ROWS,
    )
    programs_wanted = gpu.cores * (4 if rows <= config.FEW_ROWS else 1)
    split = max(1, programs_wanted // config.programs("forward", rows, shape, tiles))
    longest = max(1, config.reduction_tiles("forward", shape, tiles) // 8)
    return dataclasses.replace(tiles, split=min(split, longest))


def forward(x: jax.Array, packed: Packed, codec: Codec, tiles: Tiles | None = None) -> jax.Array:
    """y [M, O] = x [M, I] W^T in x's dtype from 8-bit operands, summed in float32."""
    shape, rows = Shape(*codec.shape), x.shape[0]
    if rows == 0:
        return jnp.zeros((0, shape.out_features), x.dtype)
    jax_triton = triton_backend.load_jax_triton("triton")
    from pallas_kernels.nf4_matmul.triton.fp8 import forward_kernel

    gpu = triton_backend.current_gpu()
    tiles = tiles or heuristic(rows, shape, codec.block_size, gpu)
    is_partial = tiles.split > 1
    size = (tiles.split, rows, shape.out_features) if is_partial else (rows, shape.out_features)
    out = jax_triton.triton_call(
        *operands(x, packed, codec, tiles),
        rows=rows,
        kernel=forward_kernel,
        out_type=jax.ShapeDtypeStruct(size, jnp.float32 if is_partial else x.dtype),
        grid=(config.programs("forward", rows, shape, tiles), tiles.split),
        name=f"nf4_matmul_forward_{codec.compute}",
        compute_capability=gpu.compute_capability,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        backend_options=triton_backend.backend_options(gpu.compute_capability),
        cost_estimate={
            "flops": 2 * rows * shape.out_features * shape.in_features,
            "bytes_accessed": x.size
            + packed.codes.nbytes
            + packed.absmax.nbytes
            + rows * shape.out_features * x.dtype.itemsize,
        },
        **constants(codec, tiles),
    )
    return out.sum(0).astype(x.dtype) if is_partial else out


def operands(x: jax.Array, packed: Packed, codec: Codec, tiles: Tiles) -> tuple[jax.Array | None, ...]:
    """x, x_scales, codes, table, absmax, scale_map, nested_absmax, offset as the kernel takes them."""
    from pallas_kernels.nf4_matmul.triton.fp8 import table_words

    values, scales = fp8.quantize(x, fp8.run_length(codec))
    _, factor = fp8.table8(codec.table)
    table = jnp.asarray(table_words(codec.table))
    return values, scales.T / factor, packed.codes, table, *triton_backend.scale_operands(packed, codec, tiles)


def constants(codec: Codec, tiles: Tiles) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    out_features, in_features = codec.shape
    return {
        "HALF": out_features // 2,
        "IN_FEATURES": in_features,
        "SCALES_PER_ROW": in_features // codec.block_size,
        "BLOCK_M": tiles.block_m,
        "BLOCK_O": tiles.block_o,
        "BLOCK_I": tiles.block_i,
        "SPLIT": tiles.split,
        "GROUP_M": tiles.group_m,
        "STAGES": tiles.num_stages,
        "ROW_SCALES": codec.compute == "fp8_row",
    }
