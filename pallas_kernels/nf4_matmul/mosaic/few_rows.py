"""y = x W^T on Hopper for up to 16 rows of x, where reading the packed bytes is the bound.

The kernel's work is one text of PTX (few_rows_ptx.py): Pallas' own operations reach neither a look-up in shared
memory by lane nor a fragment of mma as it lies in global memory. Pallas gives it its grid, clusters, shared memory and
arrays. Tests emulate the text, and compile it for an H200 (2.2 instructions a weight up to 8 rows, 2.5 up to 16). There
its values were right, and it was the fastest form, but far from the memory's speed (results/), when a second kernel
added the parts of a sum; clusters that add them here have not run on a GPU.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.gpu import current_gpu
from pallas_kernels.nf4_matmul.mosaic import few_rows_ptx
from pallas_kernels.nf4_matmul.mosaic.few_rows_program import GROUP, Program
from pallas_kernels.nf4_matmul.operands import Codec, Packed, are_alike

WARPS = 16 * 132  # that run at once on an H200 by registers; each multiprocessor then has 64 KiB of codes under way
SPLITS = (1, 2, 4, 8)  # a cluster's programs: 8 is the most that every Hopper card is sure to run together
FULL = 0.9  # of their places in the last wave that programs should take


def forward(x: jax.Array, packed: Packed, codec: Codec, split: int | None = None) -> jax.Array:
    """y [M, O] = x [M, I] W^T in x's dtype, summed in float32; as `forward_joined` of one weight."""
    return forward_joined(x, (packed,), (codec,), split)


def forward_joined(
    x: jax.Array, packed: Sequence[Packed], codecs: Sequence[Codec], split: int | None = None
) -> jax.Array:
    """y [M, sum of O] of several weights side by side, in x's dtype, summed in float32: one launch.

    Args:
      x: [M, I], 1 to 16 rows, bfloat16 or float16.
      packed, codecs: weights that hopper.unsupported takes, and that `may_join` if there are several.
      split: programs that share one sum, one of SPLITS, at most I / 128; by default as many as fill a GPU.
    Raises RuntimeError for another GPU than a Hopper.
    """
    program = make_program(x.shape[0], x.dtype, codecs, packed[0].nested_absmax is not None, split)
    gpu = current_gpu("mosaic")
    if gpu.compute_capability != 90:
        raise RuntimeError(f'backend "mosaic" needs a Hopper GPU, this program is for {gpu.name}')
    return plgpu.kernel(
        lambda *refs: _kernel(program, *refs),
        out_type=jax.ShapeDtypeStruct((x.shape[0], sum(program.out_features)), x.dtype),
        grid=(program.tiles,),
        grid_names=("tile",),
        cluster=(program.split,),
        cluster_names=("split",),
        num_threads=program.warps // 4,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((program.shared_bytes,), jnp.uint8)],
    )(*[array.reshape(-1) for array in operands(x, packed, codecs)])


def may_join(packed: Sequence[Packed], codecs: Sequence[Codec]) -> bool:
    """Whether weights of one x can share a launch: what differs is out-features alone."""
    return are_alike(packed, codecs)


def operands(x: jax.Array, packed: Sequence[Packed], codecs: Sequence[Codec]) -> list[jax.Array]:
    """x, the map of 8-bit scales, and of each weight codes, scales, nested scales, offset; scales as they are stored.

    Of plain scales x and absmax stand for what there is not, which is not read.
    """
    absmax_map = jnp.asarray(codecs[0].absmax_map, jnp.float32) if packed[0].nested_absmax is not None else x
    arrays = [x, absmax_map]
    for one in packed:
        nested = [one.absmax if array is None else array for array in (one.nested_absmax, one.offset)]
        arrays += [one.codes, one.absmax, *nested]
    return arrays


def make_program(
    rows: int, dtype: jnp.dtype, codecs: Sequence[Codec], nested: bool, split: int | None = None
) -> Program:
    """The program of a call; `split` as in `forward_joined`. ValueError: a number of rows that it is not for."""
    if not 1 <= rows <= 16:
        raise ValueError(f"x has {rows} rows, this kernel takes 1 to 16: call hopper.forward")
    if split is not None and split not in SPLITS:
        raise ValueError(f"split is {split}, expected one of {', '.join(map(str, SPLITS))}")
    first = codecs[0]
    sizes = (tuple(codec.shape[0] for codec in codecs), first.shape[1])
    program = Program(rows, *sizes, first.block_size, jnp.dtype(dtype).name, first.table, nested, 1)
    return dataclasses.replace(program, split=split or _split(program))


def _split(program: Program) -> int:
    """The least split with which the programs about fill the GPU, or else the one that fills it best; unmeasured."""
    at_once, tiles = WARPS // program.warps, program.tiles
    largest = max(1, program.in_features // GROUP // program.warps)  # a group for every warp
    splits = [split for split in SPLITS if split <= largest]
    fill = {split: tiles * split / (-(-tiles * split // at_once) * at_once) for split in splits}
    return next((split for split in fill if fill[split] >= FULL), max(fill, key=fill.__getitem__))


def _kernel(program: Program, *refs) -> None:
    *arrays, out, shared = refs
    references, numbers = (*arrays, out, shared), program.columns(jax.lax.axis_index("split"))

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * len(references), *[plgpu.Layout.WG_SPLAT(())] * len(numbers)), return_type=()
    )
    def run(_, *operands):
        pointers = [mgpu.utils.memref_ptr(reference) for reference in operands[: len(references)]]
        x, absmax_map, *weights, out, shared = pointers
        words = [number.registers.item() for number in operands[len(references) :]]
        shared = llvm.ptrtoint(ir.IntegerType.get_signless(32), shared)
        arguments = (shared, *words, x, absmax_map, out, *weights)
        mgpu.utils.inline_ptx(few_rows_ptx.text(program), *arguments, has_side_effects=True, convergent=True)

    run(*references, *numbers)
