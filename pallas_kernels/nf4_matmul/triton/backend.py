"""Launches the Triton kernels through jax-triton: y = x W^T and dx = dy W for NVIDIA GPUs from compute capability 8.0.

`forward_lora` and `backward_lora` add an adapter's low-rank term to the sums, for a whole pack in one launch.

Nothing here imports Triton before a kernel is really called, so that every other path works without it.
"""

import dataclasses
import importlib
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.nf4_matmul import config, reference
from pallas_kernels.nf4_matmul.config import Gpu, Tiles
from pallas_kernels.nf4_matmul.operands import Codec, Packed
from pallas_kernels.nf4_matmul.shapes import Shape

LARGEST_HALF = 2**31  # bytes of codes are addressed by 32-bit integers
# compute capabilities of GPUs that programs are lowered for where there is none: the abstract device has only a name
CAPABILITIES = {"A100": 80, "A6000": 86, "RTX 3090": 86, "RTX 4090": 89, "L40": 89, "H100": 90, "H200": 90, "A10": 86}


class LowRank(NamedTuple):
    """The term that the adapters of a pack add: left times right, each adapter's rows by its own."""

    left: jax.Array  # u or du [A, M, R]
    right: jax.Array  # B [A, O, R] in forward, A [A, R, I] in backward; dtype of left


def unsupported(shape: tuple[int, int], block_size: int, dtype: jnp.dtype) -> str | None:
    """Why the kernels do not take a weight [O, I] with activations of dtype, or None if they do."""
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


def current_gpu(backend: str = "triton") -> Gpu:
    """The GPU that programs are traced for: the abstract mesh's, or this process's first.

    Raises RuntimeError, which names the backend, where there is none, or one before compute capability 8.0.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.num_cores is not None:
        known = [capability for name, capability in CAPABILITIES.items() if name in abstract.device_kind]
        if not known:
            raise RuntimeError(f"{abstract.device_kind} is none of {', '.join(CAPABILITIES)}, which can be lowered for")
        return Gpu(abstract.device_kind, known[0], abstract.num_cores)
    device: Any = jax.devices()[0]
    needs = f'backend "{backend}" needs'
    if device.platform != "gpu" or not hasattr(device, "compute_capability"):
        raise RuntimeError(f"{needs} an NVIDIA GPU, this process computes on {device.device_kind}")
    capability = int(float(device.compute_capability) * 10 + 0.5)
    if capability < 80:
        raise RuntimeError(f"{needs} compute capability 8.0, {device.device_kind} has {capability / 10}")
    return Gpu(device.device_kind, capability, device.core_count)


def load_jax_triton(backend: str) -> ModuleType:
    """The module jax_triton. Raises ImportError, which names the backend, where it or Triton is missing."""
    try:
        driver = importlib.import_module("triton.backends.nvidia.driver")
        if not hasattr(driver, "TMA_TF32"):
            # Triton 3.6: jax-triton 0.4 imports this name for tensor descriptors, which are not used here, and without
            # it would take Triton's whole NVIDIA backend for missing
            vars(driver)["TMA_TF32"] = 11
        return importlib.import_module("jax_triton")
    except ImportError as error:
        raise ImportError(f'backend "{backend}" needs jax-triton ({error}): pip install jax-triton==0.4.1') from error


def backend_options(compute_capability: int) -> dict[str, Any]:
    """What Triton's compiler is told.

    enable_fp_fusion: a multiply-add would round once where the reference rounds twice; dot products are not concerned.
    ptx_version: XLA's ptxas compiles the PTX, not Triton's, which may be newer (3.9 writes PTX 9.4 for Hopper, CUDA
    13.0 takes 9.0). CUDA from 12.4 on takes 8.4; Blackwell begins at 8.7.
    """
    return {"enable_fp_fusion": False, "ptx_version": 84 if compute_capability < 100 else 87}


def forward(x: jax.Array, packed: Packed, codec: Codec, tiles: Tiles | None = None) -> jax.Array:
    """y [M, O] = x [M, I] W^T in x's dtype, summed in float32."""
    return _launch("forward", x, packed, codec, tiles)


def backward(dy: jax.Array, packed: Packed, codec: Codec, tiles: Tiles | None = None) -> jax.Array:
    """dx [M, I] = dy [M, O] W in dy's dtype, summed in float32."""
    return _launch("backward", dy, packed, codec, tiles)


def forward_lora(
    x: jax.Array, u: jax.Array, b: jax.Array, packed: Packed, codec: Codec, tiles: Tiles | None = None
) -> jax.Array:
    """y [A, M, O] = x [A, M, I] W^T + u [A, M, R] B^T, b [A, O, R], for A adapters; all in x's dtype."""
    y = _launch("forward", x.reshape(-1, x.shape[-1]), packed, codec, tiles, LowRank(u, b))
    return y.reshape(*x.shape[:2], y.shape[1])


def backward_lora(
    dy: jax.Array, du: jax.Array, a: jax.Array, packed: Packed, codec: Codec, tiles: Tiles | None = None
) -> jax.Array:
    """dx [A, M, I] = dy [A, M, O] W + du [A, M, R] A, a [A, R, I], for A adapters; all in dy's dtype."""
    dx = _launch("backward", dy.reshape(-1, dy.shape[-1]), packed, codec, tiles, LowRank(du, a))
    return dx.reshape(*dy.shape[:2], dx.shape[1])


def _launch(
    op: config.Op,
    x: jax.Array,
    packed: Packed,
    codec: Codec,
    tiles: Tiles | None,
    low_rank: LowRank | None = None,
) -> jax.Array:
    shape, rows = Shape(*codec.shape), x.shape[0]
    columns = shape.out_features if op == "forward" else shape.in_features
    if rows == 0:
        return jnp.zeros((0, columns), x.dtype)
    jax_triton = load_jax_triton("triton")
    from pallas_kernels.nf4_matmul.triton.backward import backward_kernel
    from pallas_kernels.nf4_matmul.triton.forward import forward_kernel

    gpu = current_gpu()
    adapters, rank = (1, 0) if low_rank is None else (low_rank.left.shape[0], low_rank.left.shape[2])
    tiles = tiles or tiles_of_pack(op, rows // adapters, adapters, shape, codec.block_size, gpu)
    partial = tiles.split > 1
    out_type = jax.ShapeDtypeStruct(
        (tiles.split, rows, columns) if partial else (rows, columns), jnp.float32 if partial else x.dtype
    )
    out = jax_triton.triton_call(
        x,
        *operands(packed, codec, x.dtype, tiles),
        *low_rank_operands(low_rank),
        rows=rows // adapters,
        kernel=forward_kernel if op == "forward" else backward_kernel,
        out_type=out_type,
        grid=(adapters * config.programs(op, rows // adapters, shape, tiles), tiles.split),
        name=f"nf4_matmul_{op}" if low_rank is None else f"nf4_matmul_lora_{op}",
        compute_capability=gpu.compute_capability,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        backend_options=backend_options(gpu.compute_capability),
        cost_estimate={
            "flops": 2 * rows * (shape.out_features * shape.in_features + rank * columns),
            "bytes_accessed": x.nbytes
            + packed.codes.nbytes
            + packed.absmax.nbytes
            + rows * columns * x.dtype.itemsize
            + sum(leaf.nbytes for leaf in low_rank or ()),
        },
        **constants(op, codec, x.dtype, tiles, adapters, rank),
    )
    return out.sum(0).astype(x.dtype) if partial else out


def tiles_of_pack(op: config.Op, rows: int, adapters: int, shape: Shape, block_size: int, gpu: Gpu) -> Tiles:
    """The plain product's tiles at one adapter's rows; the other adapters take the place of splits."""
    tiles = config.choose(op, rows, shape, block_size, gpu)
    return tiles if adapters == 1 else dataclasses.replace(tiles, split=max(1, tiles.split // adapters))


def low_rank_operands(low_rank: LowRank | None) -> tuple[jax.Array | None, jax.Array | None]:
    """The kernels' u and b (du and a), the adapters' rows one after another; None where there is no adapter."""
    if low_rank is None:
        return None, None
    left, right = low_rank
    return left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])


def operands(packed: Packed, codec: Codec, dtype: jnp.dtype, tiles: Tiles) -> tuple[jax.Array | None, ...]:
    """codes, table, absmax, scale_map, nested_absmax, offset as the kernels take them."""
    from pallas_kernels.nf4_matmul.triton.decode import table_words

    table = jnp.asarray(table_words(codec.table, jnp.dtype(dtype).name))
    return packed.codes, table, *scale_operands(packed, codec, tiles)


def scale_operands(packed: Packed, codec: Codec, tiles: Tiles) -> tuple[jax.Array | None, ...]:
    """absmax, scale_map, nested_absmax, offset: as they are stored, or expanded to a float32 absmax alone."""
    scale_map = np.asarray(codec.absmax_map, np.float32)
    nested = packed.nested_absmax is not None
    if nested and tiles.scales_in_kernel:
        return packed.absmax, jnp.asarray(scale_map), packed.nested_absmax, packed.offset
    absmax = reference.dequantize_absmax(packed.absmax, packed.nested_absmax, packed.offset, scale_map)
    return absmax, None, None, None


def constants(
    op: config.Op, codec: Codec, dtype: jnp.dtype, tiles: Tiles, adapters: int = 1, rank: int = 0
) -> dict[str, Any]:
    """The kernels' compile-time arguments; rank 0 is no adapter."""
    import triton.language as tl

    out_features, in_features = codec.shape
    values: dict[str, Any] = {
        "HALF": out_features // 2,
        "IN_FEATURES": in_features,
        "SCALES_PER_ROW": in_features // codec.block_size,
        "BLOCK_M": tiles.block_m,
        "BLOCK_O": tiles.block_o,
        "BLOCK_I": tiles.block_i,
        "SPLIT": tiles.split,
        "GROUP_M": tiles.group_m,
        "ADAPTERS": adapters,
        "RANK": rank,
        "BLOCK_R": block_r(op, rank, tiles) if rank else 0,
        "DTYPE": getattr(tl, jnp.dtype(dtype).name),
    }
    return values | ({"SCALE_SUMS": tiles.scale_sums} if op == "forward" else {})


def block_r(op: config.Op, rank: int, tiles: Tiles) -> int:
    """How much of the rank the low-rank term sums at once; sums that fill the registers leave room for 16 alone."""
    sums = 2 * tiles.block_o * tiles.block_m if op == "forward" else tiles.block_m * tiles.block_i
    is_full = sums >= config.ACCUMULATORS * 32 * tiles.num_warps
    return 16 if is_full else min(32, max(16, config.row_bucket(rank)))
