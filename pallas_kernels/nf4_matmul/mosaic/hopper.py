"""Mosaic GPU kernels for Hopper: y = x W^T and dx = dy W at training row counts, W decoded in wgmma's own registers.

A product is computed on its side, y^T = W x^T and dx^T = W^T dy^T: W is the left operand, which wgmma takes from
registers, and x the right one, in shared memory as it came. No weight is written to memory. A weight costs 5
instructions (fragments_ptx.py), two thirds of them on the pipe for whole numbers: at 256 rows that pipe is busy for 40%
of the time that the tensor cores are.

A program has two computing warpgroups and one that only copies tiles of x or dy, of packed bytes and of scales, some
steps ahead. A computing warpgroup keeps 64 columns of the result for up to 256 rows in registers:

forward: a program takes 64 byte rows of W, 32 each warpgroup, which are 32 rows of either half. A step is 64 columns.

backward: a program takes 128 columns of W, 64 each warpgroup. The sum runs over the rows of W: a step is 32 byte rows,
which are 32 rows of either half, each with its own columns of dy.

A step decodes its operand while wgmma still multiplies by the one before, and then waits for that one: its registers
are written by the step after, its tiles may be copied over. Two programs side by side share their tiles of x or dy:
then they ask 20 bytes a clock each of the second-level cache and not 36, which is more than it has by estimate.

Up to 16 rows forward are another kernel's (few_rows.py).

Tests run all but the registers in Mosaic's interpreter, the registers thread by thread in an emulator, and compile both
kernels for an H200. They have not run on one.
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
from pallas_kernels.nf4_matmul.mosaic import fragments
from pallas_kernels.nf4_matmul.mosaic.decode import table_words
from pallas_kernels.nf4_matmul.mosaic.fragments_ptx import backward_text, forward_text
from pallas_kernels.nf4_matmul.operands import Codec, Packed

ROWS = 256  # of x or dy in a program, at most: 128 float32 registers a thread
SIDE = 128  # columns of the result in a program
CLUSTER = 2  # programs that share their rows of x or dy: each copies a half to both
STEP = 64  # rows of wgmma's left operand, and what one step sums over
BYTE_ROWS = 64  # of a program forward
STAGES = 4  # steps in flight, of which every weight has a multiple; with the results 210 KiB of shared memory
HOPPER = ("H100", "H200", "H800", "GH200")
COPYING_REGISTERS, COMPUTING_REGISTERS = 40, 232  # of a thread: 65,536 in all


def unsupported(shape: tuple[int, int], block_size: int, dtype: jnp.dtype) -> str | None:
    """Why the kernels do not take a weight [O, I] with activations of dtype, or None if they do."""
    out_features, in_features = shape
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"x is {jnp.dtype(dtype)}: tensor cores take bfloat16 and float16"
    if block_size < STEP or block_size & (block_size - 1):
        return f"the block size is {block_size}: expected a power of two from {STEP}"
    if in_features % block_size:
        return f"I is {in_features}, no multiple of the block size {block_size}: blocks cross rows"
    if out_features % 256 or in_features % 256:
        return f"the weight is {out_features} x {in_features}: expected multiples of 256"
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
    tiles = -(-rows // ROWS)
    block = -(-rows // (tiles * STEP)) * STEP  # rows of a program
    is_forward = kernel is _forward_kernel
    call = plgpu.kernel(
        functools.partial(kernel, codec=codec),
        out_type=jax.ShapeDtypeStruct((tiles * block, columns), dtype),
        grid=(tiles, columns // SIDE // CLUSTER),
        grid_names=("m", "n"),
        cluster=(CLUSTER,),
        cluster_names=("cluster",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types={
            "tiles": _forward_tiles(block, dtype) if is_forward else _backward_tiles(block, dtype, codec.block_size),
            "ready": plgpu.Barrier(num_arrivals=3 if is_forward else 4, num_barriers=STAGES),
            "free": plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=2, num_barriers=STAGES),
            "staging": _shared((2, 2, block, 32) if is_forward else (2, block, STEP), dtype),
            # of the interpreter, which takes operands from shared memory alone
            "operands": interpret and _shared((2, 1, STEP, STEP) if is_forward else (2, 2, STEP, 32), dtype),
        },
        interpret=interpret,
    )
    codes = packed.codes.reshape(codec.shape[0] // 2, codec.shape[1])
    padded = jnp.pad(x, ((0, tiles * block - rows), (0, 0)))
    scales = scale_planes(absmax, codec.shape, codec.block_size, dtype)
    return call(padded, codes, scales, np.array(table_words(codec.table, dtype), np.uint32).view(np.int32))[:rows]


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


def scale_planes(absmax: jax.Array, shape: tuple[int, int], block_size: int, dtype) -> jax.Array:
    """absmax float32 [O * C] -> uint32 [2 * C, O / 2]: row 2 c + h holds block c of the rows of half h.

    Words 2 p and 2 p + 1 are of rows 2 p and 2 p + 1 both: a scale is the sum of two numbers of dtype.
    """
    out_features, in_features = shape
    blocks = in_features // block_size
    planes = absmax.reshape(2, out_features // 2, blocks).transpose(2, 0, 1)
    planes = planes.reshape(2 * blocks, out_features // 4, 1, 2)
    info = jnp.finfo(dtype)
    hi = jax.lax.reduce_precision(planes, info.nexp, info.nmant)  # a conversion and back XLA would leave out
    parts = jnp.concatenate([hi, planes - hi], axis=2).astype(dtype)
    return jax.lax.bitcast_convert_type(parts, jnp.uint32).reshape(2 * blocks, out_features // 2)


def _place() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tile of rows, tile of columns, warpgroup."""
    n = jax.lax.axis_index("n") * CLUSTER + jax.lax.axis_index("cluster")
    return jax.lax.axis_index("m"), n, jax.lax.axis_index("warpgroup")


def _forward_tiles(block: int, dtype) -> list:
    return [
        _shared((STAGES, block, STEP), dtype),
        _shared((STAGES, BYTE_ROWS, STEP), jnp.uint8),
        plgpu.SMEM((STAGES, 2, BYTE_ROWS), jnp.uint32),
    ]


def _forward_kernel(x, codes, scales, table, out, tiles, ready, free, staging, operands, *, codec: Codec):
    m, n, warpgroup = _place()
    block = tiles[0].shape[1]
    rows, byte_rows = pl.ds(m * block, block), pl.ds(n * BYTE_ROWS, BYTE_ROWS)
    text = forward_text(x.dtype)

    def sources(step):
        columns = pl.ds(step * STEP, STEP)
        scale_rows = pl.ds(step * STEP // codec.block_size * 2, 2)
        return x.at[rows, columns], codes.at[byte_rows, columns], scales.at[scale_rows, byte_rows]

    def multiply(sums, words, x_tile, codes_tile, scales_tile):
        if operands is None:
            (w,) = fragments.operands(text, (STEP, STEP), codes_tile, scales_tile, words, x.dtype)
        else:
            mine = pl.ds(warpgroup * 32, 32)
            w = operands.at[warpgroup, 0]
            for half in range(2):
                parts = codes_tile[mine, :], half, scales_tile[half, mine]
                w[pl.ds(32 * half, 32), :] = fragments.weights(*parts, codec.table, x.dtype)
        plgpu.commit_smem()  # what was read here may be copied over
        plgpu.wgmma(sums, w, x_tile.T)

    def store(sums):
        if operands is None:
            fragments.store_y(sums.astype(x.dtype), staging.at[warpgroup])
        else:
            for half in range(2):
                staging[warpgroup, half] = sums[32 * half : 32 * half + 32].T.astype(x.dtype)
        plgpu.commit_smem()
        for half in range(2):
            columns = half * (codec.shape[0] // 2) + n * BYTE_ROWS + warpgroup * 32
            plgpu.copy_smem_to_gmem(staging.at[warpgroup, half], out.at[rows, pl.ds(columns, 32)])

    _run(warpgroup, codec.shape[1] // STEP, sources, multiply, store, table, tiles, ready, free, products=1)


def _backward_tiles(block: int, dtype, block_size: int) -> list:
    return [
        _shared((STAGES, block, 32), dtype),
        _shared((STAGES, block, 32), dtype),
        _shared((STAGES, 32, SIDE), jnp.uint8),
        plgpu.SMEM((STAGES, 2 * max(1, SIDE // block_size), 32), jnp.uint32),
    ]


def _backward_kernel(dy, codes, scales, table, out, tiles, ready, free, staging, operands, *, codec: Codec):
    m, n, warpgroup = _place()
    block, scale_rows = tiles[0].shape[1], tiles[-1].shape[1]
    rows, columns = pl.ds(m * block, block), pl.ds(n * SIDE, SIDE)
    half = codec.shape[0] // 2
    text = backward_text(dy.dtype, 256 if scale_rows == 4 else 0)

    def sources(step):
        byte_rows = pl.ds(step * 32, 32)
        first_scale = n * SIDE // codec.block_size * 2
        return (
            dy.at[rows, byte_rows],
            dy.at[rows, pl.ds(half + step * 32, 32)],
            codes.at[byte_rows, columns],
            scales.at[pl.ds(first_scale, scale_rows), byte_rows],
        )

    def multiply(sums, words, low_dy, high_dy, codes_tile, scales_tile):
        if operands is None:
            both = fragments.operands(text, (STEP, 32), codes_tile, scales_tile, words, dy.dtype)
        else:
            both = [operands.at[warpgroup, nibble] for nibble in range(2)]
            for nibble in range(2):
                scale_row = nibble + (2 * warpgroup if scale_rows == 4 else 0)
                parts = codes_tile[:, pl.ds(warpgroup * STEP, STEP)], nibble, scales_tile[scale_row]
                both[nibble][...] = fragments.weights(*parts, codec.table, dy.dtype).T
        plgpu.commit_smem()
        plgpu.wgmma(sums, both[0], low_dy.T)
        plgpu.wgmma(sums, both[1], high_dy.T)

    def store(sums):
        if operands is None:
            fragments.store_dx(sums, staging.at[warpgroup])
        else:
            staging[warpgroup] = sums.astype(dy.dtype).T
        plgpu.commit_smem()
        target = out.at[rows, pl.ds(n * SIDE + warpgroup * STEP, STEP)]
        plgpu.copy_smem_to_gmem(staging.at[warpgroup], target)

    _run(warpgroup, half // 32, sources, multiply, store, table, tiles, ready, free, products=2)


def _run(warpgroup, steps: int, sources, multiply, store, table, tiles, ready, free, products: int) -> None:
    """The steps of a program: the third warpgroup copies `sources` ahead, the first two `multiply` and then `store`.

    Steps are written out STAGES at a time: buffers are then known when the program is compiled, and registers of
    operands in flight are not those that the next step writes. `products`: groups of wgmma in a step.
    """
    rounds = steps // STAGES

    def copy():
        plgpu.set_max_registers(COPYING_REGISTERS, action="decrease")

        def start(step, stage):
            for number, (source, tile) in enumerate(zip(sources(step), tiles, strict=True)):
                axes = "cluster" if number < products else None  # x or dy, the same in all of a cluster
                plgpu.copy_gmem_to_smem(source, tile.at[stage], ready.at[stage], collective_axes=axes)

        for stage in range(STAGES):
            start(stage, stage)
        plgpu.barrier_wait(free.at[STAGES - 1])  # of no step: what the first step hands back

        @pl.loop(1, rounds)
        def _(round):
            for stage in range(STAGES):
                plgpu.barrier_wait(free.at[stage])
                start(round * STAGES + stage, stage)

        for stage in range(STAGES - 1):
            plgpu.barrier_wait(free.at[stage])

    def compute():
        plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
        words = [table[k] for k in range(8)]

        def run(sums):
            @pl.loop(0, rounds)
            def _(_):
                for stage in range(STAGES):
                    plgpu.barrier_wait(ready.at[stage])
                    multiply(sums, words, *[tile.at[stage] for tile in tiles])
                    plgpu.wgmma_wait(products)  # the step before is done
                    plgpu.barrier_arrive(free.at[(stage - 1) % STAGES])

            return sums[...]

        store(pl.run_scoped(run, plgpu.ACC((STEP, tiles[0].shape[1]), jnp.float32)))
        plgpu.wait_smem_to_gmem(0)

    jax.lax.cond(warpgroup == 2, copy, compute)


def _shared(shape: tuple[int, ...], dtype) -> Any:
    return plgpu.SMEM(shape, dtype, transforms=fragments.swizzle(dtype, shape[-1]))
