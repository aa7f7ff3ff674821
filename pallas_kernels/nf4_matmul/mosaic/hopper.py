"""Mosaic GPU kernels for Hopper: y = x W^T and dx = dy W at training row counts, W decoded once per tile.

A program has two computing warpgroups and one that only copies. The copies bring tiles of x or dy, of packed bytes and
of scales into shared memory, some steps ahead. A computing warpgroup decodes its tile of W into shared memory, in the
swizzled order that wgmma reads, and multiplies while it decodes the next one into a second buffer:

forward: both warpgroups see the same bytes [BLOCK, 64]; the first takes the low nibbles (rows o of W), the second the
high ones (rows o + O / 2), and both multiply the same tile of x [BLOCK, 64].

backward: the sum runs over the rows of W, first those of the low nibbles and then those of the high ones; the two
warpgroups see the same tile of dy [BLOCK, 64] and take BLOCK columns of W each.

Up to 16 rows forward are another kernel's (few_rows.py).

A step waits for the product before its own: then no product reads the buffer that the next step decodes into, nor the
tile of x or dy that the pipeline hands back (delay_release).

Tests run them in Mosaic's interpreter, emulate the assembly of the look-up, and compile both for an H200. There their
values were right, and at 1,024 rows they lost to dequantizing first (results/).
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels.nf4_matmul import reference
from pallas_kernels.nf4_matmul.config import FEW_ROWS
from pallas_kernels.nf4_matmul.mosaic import few_rows as mosaic_few_rows
from pallas_kernels.nf4_matmul.mosaic.decode import LAYOUT, decode, scale_planes
from pallas_kernels.nf4_matmul.operands import Codec, Packed

BLOCK = 128  # rows of x or dy, and columns of the result for each warpgroup: 128 float32 registers a thread
STEP = 64  # summed over in one step: 128 bytes of 16-bit values, the widest swizzle
STAGES = 3  # steps in flight: 171 KiB of shared memory forward, 198 backward, of 227
HOPPER = ("H100", "H200", "H800", "GH200")
MEMORY_REGISTERS = 40  # of the warpgroup that copies; the others share what it leaves


def unsupported(shape: tuple[int, int], block_size: int, dtype: jnp.dtype) -> str | None:
    """Why the kernels do not take a weight [O, I] with activations of dtype, or None if they do."""
    out_features, in_features = shape
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"x is {jnp.dtype(dtype)}: tensor cores take bfloat16 and float16"
    if block_size < STEP or block_size & (block_size - 1):
        return f"the block size is {block_size}: expected a power of two from {STEP}"
    if in_features % block_size:
        return f"I is {in_features}, no multiple of the block size {block_size}: blocks cross rows"
    if out_features % (2 * BLOCK) or in_features % (2 * BLOCK):
        return f"the weight is {out_features} x {in_features}: expected multiples of {2 * BLOCK}"
    return None


def forward(x: jax.Array, packed: Packed, codec: Codec, interpret: Any = None) -> jax.Array:
    """y [M, O] = x [M, I] W^T in x's dtype, summed in float32. `interpret`: plgpu.InterpretGPUParams, for tests.

    Up to 16 rows have a kernel of their own, which is inline PTX and cannot be interpreted.
    """
    if interpret is None and 1 <= x.shape[0] <= FEW_ROWS:
        _check_gpu()
        return mosaic_few_rows.forward(x, packed, codec)
    return _launch(_forward_kernel, codec.shape[0], x, packed, codec, interpret)


def backward(dy: jax.Array, packed: Packed, codec: Codec, interpret: Any = None) -> jax.Array:
    """dx [M, I] = dy [M, O] W in dy's dtype, summed in float32. `interpret`: plgpu.InterpretGPUParams, for tests."""
    return _launch(_backward_kernel, codec.shape[1], dy, packed, codec, interpret)


def _launch(kernel, columns: int, x: jax.Array, packed: Packed, codec: Codec, interpret: Any) -> jax.Array:
    rows, dtype = x.shape[0], x.dtype
    if rows == 0:
        return jnp.zeros((0, columns), dtype)
    if interpret is None:
        _check_gpu()
    absmax_map = np.asarray(codec.absmax_map, np.float32)
    absmax = reference.dequantize_absmax(packed.absmax, packed.nested_absmax, packed.offset, absmax_map)
    tiles = -(-rows // BLOCK)
    call = plgpu.kernel(
        functools.partial(kernel, codec=codec, permutes=interpret is None),
        out_type=jax.ShapeDtypeStruct((tiles * BLOCK, columns), dtype),
        grid=(tiles, columns // (2 * BLOCK)),
        grid_names=("m", "n"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types={
            # [warpgroup, buffer, rows, columns] of W: rows are out-features
            "weights": _shared((2, 2, *((BLOCK, STEP) if kernel is _forward_kernel else (STEP, BLOCK))), dtype),
            "results": _shared((2, BLOCK, STEP), dtype),
        },
        interpret=interpret,
    )
    codes = packed.codes.reshape(codec.shape[0] // 2, codec.shape[1])
    padded = jnp.pad(x, ((0, tiles * BLOCK - rows), (0, 0)))
    return call(padded, codes, scale_planes(absmax, codec.shape, codec.block_size))[:rows]


def _check_gpu() -> None:
    """Raises RuntimeError unless programs are traced for a Hopper GPU: the abstract mesh's, or this process's first."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.num_cores is not None:
        kind, is_hopper = abstract.device_kind, any(name in abstract.device_kind for name in HOPPER)
    else:
        device: Any = jax.devices()[0]
        kind, is_hopper = device.device_kind, str(getattr(device, "compute_capability", "")) == "9.0"
    if not is_hopper:
        raise RuntimeError(f'backend "mosaic" needs a Hopper GPU ({", ".join(HOPPER)}), this program is for {kind}')


def _forward_kernel(x, codes, scales, out, weights, results, *, codec: Codec, permutes: bool):
    m, n, warpgroup = jax.lax.axis_index("m"), jax.lax.axis_index("n"), jax.lax.axis_index("warpgroup")
    steps_a_scale = codec.block_size // STEP

    def step(index, x_tile, codes_tile, scales_tile, sums):
        buffer = weights.at[warpgroup, index[0] % 2]
        for row in range(0, BLOCK, STEP):
            part = pl.ds(row, STEP)
            codes_part, scales_part = codes_tile.at[part, :], scales_tile.at[warpgroup, part]
            buffer[part, :] = _decode(codes_part, 4 * warpgroup, scales_part, codec, x, permutes)
        plgpu.commit_smem()
        plgpu.wgmma(sums, x_tile, buffer.T)
        plgpu.wgmma_wait(1)  # the step before is done: its buffers may be written again
        return sums

    def store(sums):
        _store(sums, out, results.at[warpgroup], m, warpgroup * (codec.shape[0] // 2) + n * BLOCK)

    _run_pipeline(
        step,
        store,
        codec.shape[1] // STEP,
        [
            _tiles((BLOCK, STEP), lambda k: (m, k), x.dtype),
            _tiles((BLOCK, STEP), lambda k: (n, k), codes.dtype),
            plgpu.BlockSpec((2, BLOCK), lambda k: (k // steps_a_scale, n), delay_release=1),
        ],
        (x, codes, scales),
    )


def _backward_kernel(dy, codes, scales, out, weights, results, *, codec: Codec, permutes: bool):
    m, n, warpgroup = jax.lax.axis_index("m"), jax.lax.axis_index("n"), jax.lax.axis_index("warpgroup")
    steps_a_half = codec.shape[0] // 2 // STEP

    def step(index, dy_tile, codes_tile, scales_tile, sums):
        half = index[0] // steps_a_half
        buffer = weights.at[warpgroup, index[0] % 2]
        for first in range(0, BLOCK, STEP):  # columns that share one scale in each row
            column = warpgroup * BLOCK + first
            scale_row = 2 * (column // codec.block_size) + half
            codes_part, scales_part = codes_tile.at[:, pl.ds(column, STEP)], scales_tile.at[scale_row]
            buffer[:, pl.ds(first, STEP)] = _decode(codes_part, 4 * half, scales_part, codec, dy, permutes)
        plgpu.commit_smem()
        plgpu.wgmma(sums, dy_tile, buffer)
        plgpu.wgmma_wait(1)  # the step before is done: its buffers may be written again
        return sums

    def store(sums):
        _store(sums, out, results.at[warpgroup], m, (2 * n + warpgroup) * BLOCK)

    scale_rows = 2 * max(1, 2 * BLOCK // codec.block_size)
    tiles_a_scale = max(1, codec.block_size // (2 * BLOCK))
    _run_pipeline(
        step,
        store,
        2 * steps_a_half,
        [
            _tiles((BLOCK, STEP), lambda k: (m, k), dy.dtype),
            _tiles((STEP, 2 * BLOCK), lambda k: (k % steps_a_half, n), codes.dtype),
            plgpu.BlockSpec((scale_rows, STEP), lambda k: (n // tiles_a_scale, k % steps_a_half), delay_release=1),
        ],
        (dy, codes, scales),
    )


def _decode(codes, shift, scales, codec: Codec, x, permutes: bool) -> jax.Array:
    """[STEP, STEP] weights in x's dtype: 32 a thread, so that the registers beside the sums suffice."""
    tile = plgpu.load(codes, layout=LAYOUT)
    row_scales = plgpu.load(scales, layout=LAYOUT.reduce(1))
    return decode(tile, shift, row_scales, codec.table, x.dtype, permutes)


def _run_pipeline(step, store, steps: int, specs: list, arrays: tuple) -> None:
    """Runs `step` over the sum in the computing warpgroups while the third copies ahead, then `store` with the sums."""

    def compute(run):
        pl.run_scoped(lambda sums: store(run(sums)), plgpu.ACC((BLOCK, BLOCK), jnp.float32))

    plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        in_specs=specs,
        max_concurrent_steps=min(STAGES, steps),
        memory_registers=MEMORY_REGISTERS,
        wg_axis="warpgroup",
        num_compute_wgs=2,
        compute_context=compute,
    )(*arrays)


def _store(sums, out, staging, m, first_column) -> None:
    """Writes a warpgroup's sums to rows m * BLOCK and columns first_column of the result, STEP columns at a time."""
    values = sums[...].astype(out.dtype)
    for column in range(0, BLOCK, STEP):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staging[...] = values[:, column : column + STEP]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging, out.at[pl.ds(m * BLOCK, BLOCK), pl.ds(first_column + column, STEP)])
    plgpu.wait_smem_to_gmem(0)


def _tiles(block: tuple[int, int], index, dtype) -> plgpu.BlockSpec:
    """Tiles of a matrix, kept until the product after theirs is issued: that one's wait ends the product on them."""
    return plgpu.BlockSpec(block, index, transforms=_swizzle(dtype), delay_release=1)


def _shared(shape: tuple[int, ...], dtype) -> Any:
    return plgpu.SMEM(shape, dtype, transforms=_swizzle(dtype))


def _swizzle(dtype) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """The order in shared memory of tiles 8 rows high and STEP values wide, as wgmma reads them in 16 bits."""
    width = STEP * jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, STEP)), plgpu.SwizzleTransform(width)  # type: ignore[abstract]
